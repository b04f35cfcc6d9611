"Regular cubes on hard cases and under every scheduler of Dask; weather and tiles of real places, skipped where the data is absent."
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest, xarray as xr
from dask.distributed import Client, LocalCluster
from crop2seg.gazetteer import districts, find_place, tile_box, tile_place
from crop2seg.regular import Clock, day_clock, regular, thermal_clock
from crop2seg.season import Place, Season, growing_degree_days, preset_season, read_weather

REAL = Path(__file__).parents[2]/'shared'/'real'
HERE = Path(__file__).parent.parent
season, clock = Season(2019), day_clock(Season(2019), 14)

def cube_of(dates, bands=3, size=20, share=.4, seed=0):
    "A random cube, clear where `share` says, NaN under the clouds of its last band."
    rng = np.random.default_rng(seed)
    x = rng.normal(.2, .1, (len(dates), bands, size, size)).astype('float32')
    clear = rng.random((len(dates), size, size)) < share
    x[:, -1][~clear] = np.nan
    return xr.Dataset({'reflectance': (('time', 'band', 'y', 'x'), x), 'clear': (('time', 'y', 'x'), clear)},
                      coords=dict(time=pd.DatetimeIndex(dates), band=list('abcdefgh'[:bands]), y=np.arange(size), x=np.arange(size)))

def dates(n, seed=0): return pd.Timestamp('2018-09-01') + pd.to_timedelta(np.sort(np.random.default_rng(seed).choice(426, n, replace=False)), 'D')

@pytest.fixture(scope='module')
def cube(): return cube_of(dates(50))

CHOICES = [dict(how='median', smooth=60), dict(how='medoid', gaps='nan'), dict(how='clearest', gaps='keep'), dict(how='linear', smooth=60)]

@pytest.mark.parametrize('kw', CHOICES, ids=lambda kw: kw['how'])
def test_pixel_by_pixel(cube, kw):
    "Each pixel alone gives what the cube gives: nothing leaks between neighbours. (The least cloudy date is a matter of the whole scene.)"
    whole = regular(cube, clock, **kw)
    if kw['how'] == 'clearest': return
    for y, x in ((0, 0), (3, 7), (19, 19)):
        xr.testing.assert_equal(regular(cube.isel(y=[y], x=[x]), clock, **kw), whole.isel(y=[y], x=[x]))

@pytest.mark.parametrize('scheduler', ['threads', 'processes', 'cluster'])
def test_schedulers(cube, scheduler):
    for kw in CHOICES:
        lazy, want = regular(cube.chunk(time=7, y=9, x=6), clock, **kw), regular(cube, clock, **kw)
        if scheduler != 'cluster': xr.testing.assert_identical(lazy.compute(scheduler=scheduler), want)
        else:
            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
                xr.testing.assert_identical(lazy.compute(), want)
            break # one choice: starting a cluster takes seconds

def test_against_xarray(cube):
    "Lines between looks, at days that are looks of nobody, as xarray draws them."
    daily = Clock(np.arange(np.datetime64('2018-09-01'), np.datetime64('2019-11-02')), 1.)
    ours = regular(cube, daily, how='linear', gaps='nan').reflectance.shift(time=0)
    theirs = cube.reflectance.where(cube.clear).reindex(time=pd.date_range('2018-09-01', '2019-10-31')).interpolate_na('time')
    noon = (theirs + theirs.shift(time=-1))/2 # steps are asked at noon
    first, last = cube.clear.argmax('time'), cube.clear[::-1].argmax('time')
    np.testing.assert_allclose(ours.values[np.isfinite(noon.values)], noon.values[np.isfinite(noon.values)], atol=2e-6)
    assert first.max() < 50 and last.max() < 50

def test_counts_do_not_wrap():
    "300 looks in one step are 300, and not 44."
    many = cube_of(pd.date_range('2019-06-01', periods=300, freq='h'), bands=1, size=2, share=2)
    out = regular(many, day_clock(Season(2019, '2019-06-01', '2019-06-30'), 30))
    assert (out.looks == 300).all() and out.looks.dtype == np.uint16
    np.testing.assert_allclose(out.reflectance[0], many.reflectance.median('time'), atol=1e-6)

def test_band_without_a_value(cube):
    "A band that was lost stays missing and harms no other."
    lost = cube.copy(deep=True)
    lost.reflectance[:, 1] = np.nan
    for kw in CHOICES:
        if kw['how'] == 'medoid': continue # which look is the nearest is a matter of all bands
        out, full = regular(lost, clock, **kw), regular(cube, clock, **kw)
        assert out.reflectance.sel(band='b').isnull().all()
        xr.testing.assert_equal(out.reflectance.sel(band=['a', 'c']), full.reflectance.sel(band=['a', 'c']))
        xr.testing.assert_equal(out.flag, full.flag)

def test_band_missing_on_some_dates(cube):
    "A band that lacks values its neighbours have is filled from its own looks."
    torn = cube.copy(deep=True)
    torn.reflectance[::3, 1] = np.nan
    for kw in (dict(), dict(how='linear'), dict(smooth=60), dict(gaps='nan')):
        out = regular(torn, clock, **kw)
        assert out.reflectance.notnull().all() or 'gaps' in kw
        alone = regular(torn.isel(band=[1]), clock, **kw)
        xr.testing.assert_equal(out.reflectance.sel(band=['b']), alone.reflectance)

def test_smooth_ends_are_held(cube):
    "Before the first look and after the last the curve does not run on."
    some = cube.isel(time=slice(20, 30))
    out, seen = regular(some, clock, smooth=60).reflectance, regular(some, clock).looks > 0
    first, last = seen.argmax('time'), len(clock) - 1 - seen[::-1].argmax('time')
    steps = xr.DataArray(np.arange(len(clock)), dims='time')
    there = seen.any('time')
    for end, beyond in ((first, steps < first), (last, steps > last)):
        held = out.isel(time=end).drop_vars('time')
        assert (abs(out.drop_vars('time') - held).where(beyond & there).max() < 1e-6).all()
        assert (beyond & there).any()

def test_gaps_and_ends(cube):
    keep, nan, hold = (regular(cube, clock, gaps=g) for g in ('keep', 'nan', 'hold'))
    seen = keep.reflectance.notnull()
    assert (seen == (keep.looks > 0)).all() and hold.reflectance.notnull().all()
    for other in (nan, hold): xr.testing.assert_equal(other.reflectance.where(seen), keep.reflectance)
    inner = seen.cumsum('time').astype(bool) & seen[::-1].cumsum('time')[::-1].astype(bool)
    assert (nan.reflectance.notnull() == inner).all()
    assert (hold.flag == xr.where(hold.looks > 0, 1, 2)).all()
    assert ((keep.flag == 0) == (keep.looks == 0)).all()

def test_order_and_strangers(cube):
    "Dates in any order; dates before and after the clock change nothing."
    short = day_clock(Season(2019, '2019-03-01', '2019-08-31'), 10)
    inside = cube.sel(time=slice('2019-03-01', str(short.edges[-1] - 1)))
    for kw in CHOICES[:2] + CHOICES[3:]:
        want = regular(inside, short, **kw)
        xr.testing.assert_equal(regular(cube, short, **kw), want)
        xr.testing.assert_equal(regular(cube.isel(time=np.random.default_rng(1).permutation(50)), short, **kw), want)

def test_a_cloud_that_slipped_through_is_outvoted():
    "What the median is for: one look of three is bright everywhere; the mean would be off by .2."
    days = pd.to_datetime(['2019-06-02', '2019-06-05', '2019-06-09'])
    cloudy = cube_of(days, share=2)
    cloudy['reflectance'] = cloudy.reflectance*0 + .1
    cloudy.reflectance[1] = .7
    out = regular(cloudy, day_clock(Season(2019, '2019-06-01', '2019-06-10'), 10))
    np.testing.assert_allclose(out.reflectance, .1, atol=1e-6)

def test_weather_of_the_sample():
    weather = read_weather(HERE/'data'/'sample'/'weather.csv', season)
    assert len(weather) == 426 and weather.index[0] == pd.Timestamp('2018-09-01')
    warm = thermal_clock(season, weather, 150)
    sums = growing_degree_days(weather.tmean)
    reached = np.r_[0, sums][(warm.edges - warm.edges[0]).astype(int)]
    # an edge is the first morning past its multiple: over it by less than one day's warmth
    over = reached[:-1] - 150*np.arange(len(warm))
    assert over.min() >= 0 and over.max() < 30 and reached[-1] == sums[-1]

def test_weather_of_flanders():
    path = REAL/'flanders_2018'/'weather_daily.csv'
    if not path.exists(): pytest.skip('real data is not here')
    weather, raw = read_weather(path, Season(2018)), pd.read_csv(path, index_col='timestamp', parse_dates=True)
    np.testing.assert_allclose(weather.tmean, raw.temperature_mean['2017-09-01':'2018-10-31'] - 273.15) # kelvin was seen
    np.testing.assert_allclose(weather.rain, raw.precipitation_flux['2017-09-01':'2018-10-31'])
    assert -15 < weather.tmean.min() < weather.tmean.max() < 35 and weather.tmin.le(weather.tmax).all()
    with pytest.raises(ValueError, match='lacks 335 of 426 days of season 2019, 2018-12-01 to 2019-10-31'): read_weather(path, season)
    assert len(thermal_clock(preset_season('june', 2018), weather, 150)) == 1 + int(growing_degree_days(weather.tmean[:'2018-06-30'])[-1] // 150)

def test_real_tiles():
    if not (REAL/'stac_items').exists(): pytest.skip('real data is not here')
    seen = set()
    for path in sorted((REAL/'stac_items').glob('*.json')):
        item = json.loads(path.read_text())
        if item['type'] != 'Feature': continue
        p = item['properties']
        tile = p.get('s2:mgrs_tile') or p.get('grid:code', '').removeprefix('MGRS-') or item['id'].split('_')[1]
        asset = next(a for a in item['assets'].values() if a.get('proj:shape') in ([10980, 10980], [5490, 5490]))
        left, top = asset['proj:transform'][2], asset['proj:transform'][5]
        epsg, box = tile_box(tile)
        assert (left, top) == (box[0], box[3]), tile
        assert epsg == (p.get('proj:epsg') or int(p['proj:code'].removeprefix('EPSG:')))
        if tile != '01WCS': # across the date line: no box in degrees
            west, south, east, north = tile_place(tile).geometry.bounds # the scene may fill its tile in part only
            assert west - 1e-3 < item['bbox'][0] < item['bbox'][2] < east + 1e-3 and south - 1e-3 < item['bbox'][1] < item['bbox'][3] < north + 1e-3
        seen.add(tile)
    assert {'39QTA', '39QUA', '06VVN', '01WCS', '33XWJ', '28QCH'} <= seen

def test_every_district_is_found():
    table = districts()
    for name in table.district:
        assert find_place(name.upper()).geometry.equals(table.geometry[table.district == name].iloc[0]), name
    for name in table.region.unique(): assert find_place(name).geometry.is_valid
    assert find_place('Praha-západ') != find_place('praha vychod') and isinstance(find_place('most'), Place)
