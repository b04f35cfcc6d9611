"Profiles of real Flanders, skipped where ../shared/real is not beside the checkout; and what must hold anywhere"
import signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, rasterio, xarray as xr
from odc.geo.geobox import GeoBox
from crop2seg.atlas import profile_tables, write_profiles
from crop2seg.clouds import add_clear
from crop2seg.cube import load_cube, native_grid
from crop2seg.harmonise import ledger
from crop2seg.indices import index
from crop2seg.legend import read_legend
from crop2seg.parcels import burn, read_parcels
from crop2seg.profiles import class_profiles, class_tally, interior, parcel_profiles
from crop2seg.season import Season
from crop2seg.stac import open_source, search

flanders = Path(__file__).parents[2]/'shared'/'real'/'flanders_2018'
real = pytest.mark.skipif(not flanders.is_dir(), reason='no real imagery at shared/real')
legend = read_legend()

@pytest.fixture(scope='module')
def place():
    "The Flanders cube, its labels and parcel ids"
    items = search(open_source(flanders/'catalog.json'))
    grid = native_grid(items)
    cube = add_clear(load_cube(items, ledger(items, Season(2018)), grid, bands=('B04', 'B08', 'B11'))).compute()
    with rasterio.open(flanders/'labels.tif') as f: grid = GeoBox(f.shape, f.transform, f.crs.to_wkt())
    labels, ids = burn(read_parcels(flanders/'parcels.gpkg', legend), grid, outside=legend.void)
    return cube.assign_attrs(season_year=2018), labels, ids

@real
def test_real_profiles_say_what_farmers_do(place):
    "Medians of Flanders 2018 that any agronomist would sign: meadows green in May, maize not up, and the other way round in the dry summer"
    profiles = class_profiles(class_tally(*place, legend))
    of = {c: t.set_index('date')['median'] for c, t in profiles[profiles.seen > .3].groupby('class_id')}
    assert set(of) == set(np.unique(place[1][place[2] > 0])) - {legend.void}, 'every class with a parcel has a profile, and void is no class'
    assert of[1]['2018-05'].median() > .75 > .35 > of[6]['2018-05'].median()
    assert of[6]['2018-07'].median() > .75 > .6 > of[1]['2018-07'].median()
    assert of[13]['2018-06'].median() > of[13]['2018-09'].median() + .1               # potatoes are lifted in September

@real
def test_clear_interior_matters(place):
    "With clouds and edges left in, as the original had it, the spread of grassland is wider and the curve jumps with the weather"
    cube, labels, ids = place
    ours = class_profiles(class_tally(cube, labels, ids, legend)).query('class_id == 1 and seen > .5').set_index('date')
    theirs = class_profiles(class_tally(cube.assign(clear=cube.clear | True), labels, ids, legend, margin=0))
    theirs = theirs.query('class_id == 1').set_index('date')
    jump = lambda t: np.abs(t['median'].diff()).median()
    assert theirs['std'].median() > ours['std'].median() and jump(theirs) > 2*jump(ours)

@real
def test_season_dates_agree_with_the_calendar(place):
    "Maize of Flanders 2018: sown in late April or May, cut in September; grass before it is not taken for it"
    metrics, season = profile_tables(*place, legend)['metrics'], Season(2018)
    maize = metrics[metrics.class_id == 6]
    assert len(maize) == 4 and maize.start.between(*season.days(['2018-05-10', '2018-06-30'])).all()
    assert maize.end.between(*season.days(['2018-08-15', '2018-10-10'])).all()

@real
def test_atlas_of_flanders(place, tmp_path):
    out = write_profiles(*place, legend, tmp_path/'atlas', ('NDVI', 'EVI2', 'NDMI'))
    assert {p.name for p in out.iterdir()} >= {'profiles.csv', 'parcels.csv', 'metrics.csv', 'crops.csv', 'separability.csv', 'classes.png', 'run.json'}
    table = pd.read_csv(out/'profiles.csv')
    assert set(table['index']) == {'NDVI', 'EVI2', 'NDMI'} and table['median'].between(-1, 1.2).all()

def field(size=40, dates=6, seed=0, **chunks): # A made-up cube of four parcels in two classes
    rng = np.random.default_rng(seed)
    x = rng.uniform(.02, .5, (dates, 2, size, size)).astype('float32')
    cube = xr.Dataset(dict(reflectance=(('time', 'band', 'y', 'x'), x), clear=(('time', 'y', 'x'), rng.random((dates, size, size)) > .3)),
                      dict(time=pd.date_range('2019-03-01', periods=dates, freq='30D'), band=['B04', 'B08']), attrs=dict(season_year=2019))
    ids = np.repeat(np.repeat([[1, 2], [3, 4]], size//2, 0), size//2, 1)
    return cube, np.where(ids % 2, 4, 6).astype('uint8'), ids.astype('int32')

def test_counts_are_exact():
    "The median of every class and date, by plain numpy on values rounded to a thousandth"
    cube, labels, ids = field()
    inside, ndvi = interior(labels, ids, legend.void), index(cube).where(cube.clear).values
    for _, row in class_profiles(class_tally(cube, labels, ids, legend)).iterrows():
        t = int((cube.time == row.date).argmax())
        v = ndvi[t][inside & (labels == row.class_id)]
        v = np.round(v[np.isfinite(v)], 3)
        assert row.pixels == len(v) and np.allclose(row[['q25', 'median', 'q75']].astype(float),
                                                   np.quantile(v, [.25, .5, .75], method='averaged_inverted_cdf'), atol=1e-4)

def test_a_cloud_or_an_edge_changes_nothing():
    "Values that are not clear, or not interior, may be anything"
    cube, labels, ids = field()
    edge = ~interior(labels, ids, legend.void)
    spoilt = cube.reflectance.where(cube.clear & ~xr.DataArray(edge, dims=('y', 'x')), 9.)
    pd.testing.assert_frame_equal(class_tally(cube.assign(reflectance=spoilt), labels, ids, legend), class_tally(cube, labels, ids, legend))

MEMORY = '''
import sys, dask, dask.array as da, numpy as np, pandas as pd, xarray as xr
from crop2seg.legend import read_legend
from crop2seg.profiles import class_profiles, class_tally
dask.config.set(scheduler='threads', num_workers=2)
n, T = int(sys.argv[1]), 8
peak = lambda: next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))
x = da.random.default_rng(0).uniform(.02, .5, (T, 2, n, n), chunks=(1, 2, 512, 512)).astype('float32')
clear = da.ones((T, n, n), dtype=bool, chunks=(1, 512, 512))
cube = xr.Dataset(dict(reflectance=(('time', 'band', 'y', 'x'), x), clear=(('time', 'y', 'x'), clear)),
                  dict(time=pd.date_range('2019-03-01', periods=T, freq='30D'), band=['B04', 'B08']), attrs=dict(season_year=2019))
ids = (np.arange(n)[:, None]//64*(n//64) + np.arange(n)//64 + 1).astype('int32')
labels = (ids % 14).astype('uint8')
print(labels.nbytes + ids.nbytes, peak())
class_profiles(class_tally(cube, labels, ids, read_legend()))
print(peak())
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc to read the peak from')
def test_memory_does_not_grow_with_the_area():
    "Beyond the images of labels, ids and groups, the counts of a four times larger cube need no more"
    more = []
    for n in (1024, 2048):
        out = subprocess.run([sys.executable, '-c', MEMORY, str(n)], capture_output=True, text=True, check=True).stdout.split()
        images, before, after = map(int, out)
        more.append(after - before - 3*images)                # groups, and what the filters need for a moment
    assert more[1] < more[0] + 100e6

def test_a_killed_run_leaves_no_half_atlas(tmp_path):
    "Killed while it writes, the folder is not there; the same call then makes it"
    code = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import crop2seg.atlas as atlas, os, signal
from test_profiles import field, legend
real, seen = atlas._picture, []
def picture(*args):
    seen.append(1)
    if len(seen) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
atlas._picture = picture
atlas.write_profiles(*field(), legend, {str(tmp_path/'atlas')!r})
'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path/'atlas').exists() and (tmp_path/'.atlas.part').exists()
    out = write_profiles(*field(), legend, tmp_path/'atlas')
    assert (out/'run.json').exists() and not (tmp_path/'.atlas.part').exists()

def test_void_rims_and_void_parcels_are_no_class():
    "What a buffer makes void counts for nothing, and a parcel keeps its class"
    cube, labels, ids = field()
    rim = labels.copy(); rim[:2], rim[:, :2] = legend.void, legend.void
    parcels = parcel_profiles(cube, rim, ids, legend, margin=0)
    assert set(parcels.class_id) == set(labels[ids > 0]) - {legend.void} and set(parcels.parcel_id) == set(ids[ids > 0])
    assert legend.void not in set(class_profiles(class_tally(cube, rim, ids, legend, margin=0)).class_id)
