"Building a data set: leakage, resumption, memory, a reader of PASTIS, and the defects of the reference by name"
import hashlib, json, os, re, signal, subprocess, sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
import geopandas as gpd, numpy as np, pandas as pd, pystac, pytest, rasterio, shapely
from odc.geo.geobox import GeoBox
from crop2seg.build import build
from crop2seg.card import check_dataset
from crop2seg.legend import read_legend
from crop2seg.patches import decode, read_index, read_patch
from crop2seg.season import Place, Season
from crop2seg.simulate import simulate
from crop2seg.splits import balance, split
from crop2seg.stac import band_assets, open_source, search
from crop2seg.windows import Recipe, Truth, declared, painted

# Defects of the reference that concern building; those of reading stand in test_dataset.py, those of parcels in test_parcels.py
DEFECTS = {
    'D1': 'test_filters_filter, test_the_split_is_seeded_and_balanced',
    'D2': 'test_no_ground_in_two_sets_across_zones, test_overlapping_patches_stay_on_one_side',
    'D3': 'no weights are stored: the index holds counts of the classes by id, from which a sampler weighs',
    'D10': 'test_statistics_are_pooled_over_clear_pixels; clear looks and scene classes lie beside every series',
    'D11': 'test_statistics_are_pooled_over_clear_pixels',
    'D12': 'test_index_knows_where_it_lies, test_a_killed_build_goes_on_to_the_same_bytes',
    'D15': 'test_index_knows_where_it_lies: card, checksums, fingerprint, truth and recipe in dataset.json',
    'D17': 'labels and ids of every window come from one function with one return, shown on page 30',
    'A6': 'test_halves_of_a_day_are_one_date_and_each_tile_has_its_labels, test_filters_filter',
    'A7': 'test_dates_are_those_of_the_season; a season is an immutable value that no loop can overwrite',
    'A8': 'test_halves_of_a_day_are_one_date_and_each_tile_has_its_labels',
    'A9': 'test_peak_memory_does_not_grow_with_area',
    'A15': 'test_no_ground_in_two_sets_across_zones, test_index_knows_where_it_lies',
    'A16': 'test_dates_are_those_of_the_season',
    'A17': 'test_overlapping_patches_stay_on_one_side, test_a_patch_is_the_same_from_any_tile'}

LEGEND, QUIET, REAL = read_legend(), lambda *a: None, Path(__file__).parents[2]/'shared'/'real'
SMALL = Recipe(size=16, window=4, folds=3, block=250, looks=2)

def hashes(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}

def stripes(grid):
    "Labels and parcel ids that depend on the place alone, the same in every zone"
    rows, columns = grid.shape
    x, y = grid.affine.c + 10*np.arange(columns) + 5, grid.affine.f - 10*np.arange(rows) - 5
    xx, yy = np.meshgrid(x, y)
    lon, lat = gpd.GeoSeries(gpd.points_from_xy(xx.ravel(), yy.ravel()), crs=str(grid.crs)).to_crs(4326).pipe(lambda s: (s.x, s.y))
    number = ((lon*2000).astype(int)*1000 + (lat*2000).astype(int) % 1000).to_numpy().reshape(rows, columns)
    return (number % 13 + 1).astype('uint8'), (number % 100_000 + 1).astype('int32')

def joined(folder, *catalogs):
    "One catalog of several"
    out = pystac.Catalog('joined', 'scenes of several tiles')
    for source in catalogs:
        for item in search(open_source(source)):
            item = item.clone(); item.make_asset_hrefs_absolute() if item.get_self_href() else None
            for asset in item.assets.values(): asset.href = asset.get_absolute_href() or asset.href
            out.add_item(item)
    out.normalize_and_save(str(folder), pystac.CatalogType.SELF_CONTAINED)
    return folder/'catalog.json'

@pytest.fixture(scope='module')
def seam(tmp_path_factory):
    "Two tiles over the same ground at 12 degrees east, one in zone 32, one in zone 33"
    here, parts = tmp_path_factory.mktemp('seam'), []
    for epsg, tile in ((32632, '32UQA'), (32633, '33UUR')):
        x, y = (round(v/60)*60 for v in gpd.GeoSeries.from_xy([12.], [50.], crs=4326).to_crs(epsg).get_coordinates().iloc[0])
        parts.append(simulate(here/tile, size=160, dates=3, parcels=20, cloudy=0., tile=tile, origin=(x - 780, y + 780), epsg=epsg, seed=2))
    return joined(here/'both', *parts)

@pytest.fixture(scope='module')
def season(tmp_path_factory):
    here = tmp_path_factory.mktemp('season')
    return simulate(here/'s', size=80, dates=6, parcels=30, cloudy=.3, seed=4)

@pytest.fixture(scope='module')
def home(season, tmp_path_factory): return build(season, tmp_path_factory.mktemp('home')/'set', Truth(stripes), LEGEND, SMALL, log=QUIET)

def shared_ground(index, by='set'):
    "Square metres that patches of different sets have in common, pair by pair, in a zone's own plane"
    shapes, kind = index.to_crs(32633).geometry.values, index[by].to_numpy()
    return sum(shapes[a].intersection(shapes[b]).area for a in range(len(shapes)) for b in range(a) if kind[a] != kind[b])

def test_no_ground_in_two_sets_across_zones(seam, tmp_path, monkeypatch):
    "D2: tiles that overlap, in two zones"
    lax = replace(SMALL, looks=1, nodata=1., block=200)
    out = build(seam, tmp_path/'set', Truth(stripes), LEGEND, lax, log=QUIET)
    index, facts = read_index(out)
    assert set(index.epsg) == {32632, 32633} and set(index.set) == {'train', 'val', 'test'}
    assert shared_ground(index) < 1 and shared_ground(index, 'fold') < 1
    west = index.to_crs(4326).geometry.centroid.x < 12
    assert (west == (index.epsg == 32632)).all()                                                     # each in the zone of its centre
    check_dataset(out)
    monkeypatch.setattr('crop2seg.splits.leavers', lambda outlines, fold, ids: np.zeros(len(ids), bool))
    leaky = build(seam, tmp_path/'leaky', Truth(stripes), LEGEND, lax, log=QUIET)
    assert shared_ground(read_index(leaky)[0]) > 1000                                                # the test can fail
    with pytest.raises(ValueError, match='shares ground'): check_dataset(leaky)

def test_overlapping_patches_stay_on_one_side(season, tmp_path):
    "D2, A17: a stride of half a patch"
    out = build(season, tmp_path/'set', Truth(stripes), LEGEND, replace(SMALL, stride=8), log=QUIET)
    index, facts = read_index(out)
    assert facts['stride'] == 8 and shared_ground(index, 'fold') < 1
    within = index[index.fold == index.fold.mode()[0]]
    assert shared_ground(within.assign(set=range(len(within)))) > 1e4                                  # and they do overlap

def test_a_patch_is_the_same_from_any_tile(season, home, tmp_path):
    "The number is the place, and the pixels do not depend on what else was asked for"
    index, _ = read_index(home)
    west, south, east, north = index.geometry.iloc[[4, 5]].total_bounds
    part = build(season, tmp_path/'part', Truth(stripes), LEGEND, Recipe(size=16, window=4, folds=1, looks=2), Place.from_bbox(west, south, east, north), log=QUIET)
    few = read_index(part)[0]
    assert 0 < len(few) < len(index) and set(few.patch_id) <= set(index.patch_id)
    for i in few.patch_id:
        a, b = read_patch(home, i), read_patch(part, i)
        assert all(np.array_equal(a[k], b[k]) for k in a) and few.set_index('patch_id').dates[i].tolist() == index.set_index('patch_id').dates[i].tolist()

def test_halves_of_a_day_are_one_date_and_each_tile_has_its_labels(tmp_path):
    "A6, A8: two tiles of one zone that overlap; the day has two granules, the second tile its own parcels"
    parts = [simulate(tmp_path/t, size=64, dates=4, parcels=20, cloudy=0., tile=t, origin=(460_020 + 320*k, 5_550_000), seed=2) for k, t in enumerate(('33UVR', '33UWR'))]
    out = build(joined(tmp_path/'both', *parts), tmp_path/'set', Truth(stripes), LEGEND, SMALL, log=QUIET)
    index, facts = read_index(out)
    assert all(len(set(d)) == len(d) >= 2 for d in index.dates)
    ledger = pd.read_csv(out/'ledger.csv')
    assert (ledger.status == 'merged').any() and set(index.tile) == {'33UVR', '33UWR'}
    for row in index.itertuples():
        grid = GeoBox((16, 16), rasterio.Affine(*row.transform), f'EPSG:{row.epsg}')
        assert np.array_equal(read_patch(out, row.patch_id)['labels'], stripes(grid)[0])
        assert read_patch(out, row.patch_id)['clear'].any(0).all()                                     # no wedge of missing pixels

def test_filters_filter(season, home, tmp_path):
    "D1, A6: shares are shares, and what is refused is said"
    def some(grid):
        labels, ids = stripes(grid)
        keep = (np.arange(grid.shape[1])[None]*10 + grid.affine.c) % 160 < 50                          # 5 of 16 columns: 31 %
        return np.where(keep, labels, 14).astype('uint8'), np.where(keep, ids, 0).astype('int32')
    kept = read_index(build(season, tmp_path/'a', Truth(some), LEGEND, replace(SMALL, labelled=.3), log=QUIET))[0]
    assert len(kept) and np.allclose(kept.labelled, 5/16)
    with pytest.raises(ValueError, match='no patch has 40%'): build(season, tmp_path/'b', Truth(some), LEGEND, replace(SMALL, labelled=.4), log=QUIET)
    clear = lambda d, i: read_patch(d, i)['clear'].mean((1, 2))
    strict, facts = read_index(out := build(season, tmp_path/'c', Truth(stripes), LEGEND, replace(SMALL, least=.9, looks=1, folds=1), log=QUIET))
    assert all((clear(out, i) >= .9).all() for i in strict.patch_id)
    most = int(read_index(home)[0].dates.map(len).max())
    many, facts = read_index(build(season, tmp_path/'d', Truth(stripes), LEGEND, replace(SMALL, looks=most, folds=1), log=QUIET))
    assert (many.dates.map(len) == most).all() and sum(facts['counts']['refused'].values()) > 0
    wedge = read_index(build(season, tmp_path/'e', Truth(stripes), LEGEND, replace(SMALL, nodata=0., folds=1), log=QUIET))
    assert wedge[1]['counts']['kept'] < wedge[1]['counts']['chosen'] and any('never seen' in r for r in wedge[1]['counts']['refused'])

def test_every_defect_has_a_test_or_a_reason():
    for name, answer in DEFECTS.items():
        for said in re.findall(r'test_\w+', answer): assert callable(globals().get(said)), (name, said)

def test_the_split_is_seeded_and_balanced(home):
    "D1: the same seed deals the same folds; sets are made of folds and all are there"
    index, facts = read_index(home)
    bare = index.drop(columns=['fold', 'set'])
    once, again = (split(bare, facts['block_m'], facts['folds']).set_index('patch_id').fold for _ in range(2))
    assert once.equals(again) and balance(bare.assign(fold=once.to_numpy()), 'fold').notna().any().all()
    assert set(index.set) == {'train', 'val', 'test'} and (index.set == index.fold.astype(str).map(facts['sets'])).all()
    assert balance(index, 'fold').sum(axis=1).round(9).isin([0, 1]).all()

def test_a_limit_keeps_the_rare_class(season, tmp_path):
    def rare(grid):
        labels, ids = stripes(grid)
        at = (np.arange(grid.shape[0])[:, None]*-10 + grid.affine.f, np.arange(grid.shape[1])[None]*10 + grid.affine.c)
        return np.where((at[0] // 160 == 34685) & (at[1] // 160 == 2878), 12, np.where(labels == 12, 1, labels)).astype('uint8'), ids
    index, facts = read_index(build(season, tmp_path/'set', Truth(rare), LEGEND, replace(SMALL, limit=12, folds=1), log=QUIET))
    assert len(index) <= 12 < facts['counts']['labelled'] and index.n_12.sum() > 0

def test_statistics_are_pooled_over_clear_pixels(home):
    "D10, D11"
    out = home
    index, facts = read_index(out)
    norms = json.loads((out/'NORM_S2_patch.json').read_text())
    for name, rows in [('train', index[index.set == 'train']), *((f'Fold_{k}', t) for k, t in index.groupby('fold'))]:
        patches = [read_patch(out, i) for i in rows.patch_id]
        x = np.concatenate([p['series'].transpose(0, 2, 3, 1)[p['clear']] for p in patches]).astype(float)
        assert np.allclose(norms[name]['mean'], x.mean(0)) and np.allclose(norms[name]['std'], x.std(0))
    told = facts['statistics']['percentiles']
    x = np.concatenate([p['series'].transpose(0, 2, 3, 1)[p['clear']] for p in map(lambda i: read_patch(out, i), index.patch_id[index.set == 'train'])])
    assert np.abs(np.array(told['values']) - np.percentile(x, told['levels'], axis=0, method='inverted_cdf').T).max() <= 10

class Pastis:
    "A reader after the documented layout of PASTIS (github.com/VSainteuf/pastis-benchmark), independent of ours"
    def __init__(self, folder, folds, reference='2018-09-01'):
        self.folder, day0 = folder, datetime.fromisoformat(reference)
        meta = gpd.read_file(folder/'metadata.geojson')
        meta.index = meta['ID_PATCH'].astype(int)
        self.meta = meta[meta['Fold'].isin(folds)]
        dates = lambda s: json.loads(s) if isinstance(s, str) else s
        self.days = {i: [(datetime(int(str(d)[:4]), int(str(d)[4:6]), int(str(d)[6:])) - day0).days for _, d in sorted(dates(s).items(), key=lambda kv: int(kv[0]))]
                     for i, s in self.meta['dates-S2'].items()}
        norms = json.loads((folder/'NORM_S2_patch.json').read_text())
        self.mean, self.std = (np.stack([norms[f'Fold_{f}'][k] for f in folds]).mean(0) for k in ('mean', 'std'))
    def __len__(self): return len(self.meta)
    def __getitem__(self, n):
        i = self.meta.index[n]
        data = np.load(self.folder/'DATA_S2'/f'S2_{i}.npy').astype('float32')
        target = np.load(self.folder/'ANNOTATIONS'/f'TARGET_{i}.npy')
        ids = np.load(self.folder/'ANNOTATIONS'/f'ParcelIDs_{i}.npy')
        return (data - self.mean[None, :, None, None])/self.std[None, :, None, None], np.array(self.days[i]), target[0].astype(int), ids

def test_a_reader_of_pastis_opens_it(home):
    out = home
    index, _ = read_index(out)
    theirs = Pastis(out, [1, 2])
    assert len(theirs) == index.fold.isin([1, 2]).sum()
    for n in range(len(theirs)):
        x, days, target, ids = theirs[n]
        row = index.set_index('patch_id').loc[theirs.meta.index[n]]
        assert x.shape == (len(days), 10, 16, 16) and target.shape == ids.shape == (16, 16) and np.isfinite(x).all()
        assert days.tolist() == Season(2019).days(row.dates).tolist() and (np.diff(days) > 0).all()
        assert np.bincount(target.ravel(), minlength=15).tolist() == [row[f'n_{c}'] for c in range(15)]

def test_index_knows_where_it_lies(home):
    "D12, A15: polygons, whole EPSG codes and lengths, extensions; nothing rounded, every file named .npy, no leftovers"
    out = home
    index, facts = read_index(out)
    assert index.crs.to_epsg() == 4326 and index.geom_type.eq('Polygon').all() and set(index.epsg) == {32633}
    for row in index.itertuples():
        left, top = row.transform[2], row.transform[5]
        ground = gpd.GeoSeries([shapely.box(left, top - 160, left + 160, top)], crs=row.epsg).to_crs(4326)[0]
        assert ground.symmetric_difference(row.geometry).area < 1e-12 and len(row.dates) == len(read_patch(out, row.patch_id)['series'])
        assert left % 160 == 0 and top % 160 == 0
    assert {p.suffix for d in ('DATA_S2', 'ANNOTATIONS', 'CLEAR', 'SCL') for p in (out/d).iterdir()} == {'.npy'}
    assert subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=out).returncode == 0
    assert facts['offsets']['scenes'] > 0 and (out/'README.md').read_text().count('|') > 50           # D15
    assert sorted(p.name for p in out.parent.iterdir()) == ['set']

def test_dates_are_those_of_the_season(season, tmp_path):
    "A7, A16: a season is two ends, and both belong to it; one source serves all tiles with the same dates"
    lax, seen = Recipe(size=16, window=4, folds=1, looks=1, nodata=1.), lambda d: sorted({d for dates in read_index(d)[0].dates for d in dates})
    days = seen(build(season, tmp_path/'all', Truth(stripes), LEGEND, lax, log=QUIET))
    some = seen(build(season, tmp_path/'set', Truth(stripes), LEGEND, lax, season=Season(2019, days[1], days[-2]), log=QUIET))
    assert some == days[1:-1] and len(some) >= 2

def test_negative_reflectance_survives(tmp_path):
    "Offsets are removed before storing, and what was dark stays dark"
    source = simulate(tmp_path/'s', size=32, dates=4, parcels=6, cloudy=0., baseline='mixed', seed=1)
    items = search(open_source(source))
    path = Path(items[-1].assets[band_assets(items[-1])['B02']].get_absolute_href())
    with rasterio.open(path) as f: values, profile = f.read(1), f.profile
    values[8:12, 8:12] = 950                                                                          # reflectance -0.005 with the offset
    with rasterio.open(path, 'w', **{k: profile[k] for k in ('driver', 'width', 'height', 'count', 'dtype', 'crs', 'transform', 'nodata')}) as f: f.write(values, 1)
    index, facts = read_index(out := build(source, tmp_path/'set', Truth(stripes), LEGEND, Recipe(size=16, window=2, folds=1, looks=1, nodata=1.), log=QUIET))
    low = min(np.nanmin(decode(read_patch(out, i)['series'])) for i in index.patch_id)
    assert np.isclose(low, -.005) and set(facts['offsets']['values']) == {'0', '-1000'}

STOPS = '''
import os, signal, sys
from pathlib import Path
from crop2seg import build as b
from crop2seg.legend import read_legend
sys.path.insert(0, sys.argv[1])
from test_patches import stripes, SMALL, Truth
left, where, point = int(sys.argv[4]), sys.argv[5], None
def dies(name, module=b):
    call, count = getattr(module, name), [0]
    def wrapped(*a, **k):
        if count[0] == left: os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        return call(*a, **k)
    setattr(module, name, wrapped)
dies(where)
b.build(sys.argv[2], sys.argv[3], Truth(stripes), read_legend(), SMALL, log=print)
'''

@pytest.mark.parametrize('where, left', [('save_patch', 7), ('fill_window', 1), ('finish', 0), ('write_card', 0)])
def test_a_killed_build_goes_on_to_the_same_bytes(season, home, tmp_path, where, left):
    "D12: nothing half written is taken for whole"
    command = [sys.executable, '-c', STOPS, str(Path(__file__).parent), str(season), str(tmp_path/'set'), str(left), where]
    job = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert job.returncode == -signal.SIGKILL, job.stderr
    assert not (tmp_path/'set').exists()
    again = build(season, tmp_path/'set', Truth(stripes), LEGEND, SMALL, log=QUIET)
    assert hashes(again) == hashes(home)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['set']

def test_processes_give_the_same_bytes(season, home, tmp_path):
    far = build(season, tmp_path/'b'/'set', Truth(stripes), LEGEND, SMALL, log=QUIET, scheduler='processes', workers=2)
    assert hashes(far) == hashes(home)

def test_a_lost_file_costs_its_scene_and_is_told(season, tmp_path):
    items = search(open_source(season))
    source = joined(tmp_path/'copy', season)
    lost = search(open_source(source))[2]
    folder = tmp_path/'copy'
    item = next(p for p in folder.rglob(f'{lost.id}.json'))
    said = json.loads(item.read_text()); said['assets'][band_assets(lost)['B08']]['href'] = '/nowhere/B08.tif'; item.write_text(json.dumps(said))
    out = build(source, tmp_path/'set', Truth(stripes), LEGEND, SMALL, log=QUIET)
    ledger = pd.read_csv(out/'ledger.csv')
    assert set(ledger.status[ledger.scene == lost.id]) <= {'failed', 'dropped'} and 'failed' in set(ledger.status)
    day = str(lost.datetime.date())
    assert day not in {d for dates in read_index(out)[0].dates for d in dates}

@pytest.mark.skipif(not REAL.is_dir(), reason='no real imagery beside the checkout')
def test_flanders_goes_through_the_same_door(tmp_path):
    source, recipe = REAL/'flanders_2018'/'catalog.json', Recipe(size=16, window=4, folds=2, block=160, looks=5)
    out = build(source, tmp_path/'set', declared(REAL/'flanders_2018'/'parcels.gpkg', LEGEND), LEGEND, recipe, log=QUIET)
    index, facts = read_index(out)
    assert check_dataset(out)['patches'] == len(index) >= 4 and set(index.epsg) == {32631} and set(index.tile) == {'31UDS'}
    assert (index.dates.map(len) >= 30).all() and facts['simulated'] is False
    assert facts['offsets']['seen_in_pixels'] > .8*facts['offsets']['scenes'] and facts['offsets']['values'] == {'0': facts['offsets']['scenes']}
    same = read_index(build(source, tmp_path/'raster', painted(REAL/'flanders_2018'/'labels.tif', LEGEND), LEGEND, recipe, log=QUIET))[0]
    assert set(same.patch_id) >= set(index.patch_id)

# Peak memory: a season of 40 dates over 4000 x 4000 pixels, and over a quarter of it. CROP2SEG_SLOW=1 runs it.
def grown(source, folder, edge, dates):
    "Scenes of `edge` pixels: a few small ones laid like tiles, used again on later days"
    folder.mkdir(parents=True)
    items, out = search(open_source(source)), pystac.Catalog('grown', 'a small season laid like tiles')
    for item in items:
        for band, key in band_assets(item).items():
            asset = item.assets[key]
            with rasterio.open(asset.get_absolute_href()) as f: values, at = f.read(1), f.transform
            wide = edge*10//round(at.a)
            values = np.tile(values, [-(-wide//n) for n in values.shape])[:wide, :wide]
            with rasterio.open(path := folder/f'{item.id}.{band}.tif', 'w', driver='GTiff', width=wide, height=wide, count=1, dtype=values.dtype, crs=item.properties['proj:code'],
                               transform=at, nodata=0, tiled=True, blockxsize=512, blockysize=512) as f: f.write(values, 1)
            asset.href, asset.extra_fields['proj:shape'] = str(path), [wide, wide]
    left, top = at.c, at.f
    ground = gpd.GeoSeries([shapely.segmentize(shapely.box(left, top - 10*edge, left + 10*edge, top), 2000)], crs=32633).to_crs(4326)[0]
    for k, day in enumerate(pd.date_range('2018-10-01T10:10', '2019-09-30T10:10', dates, tz='UTC')):
        item = items[k % len(items)].clone()
        item.id, item.datetime = f'{item.id}_{k}', day.to_pydatetime()
        item.geometry, item.bbox = shapely.geometry.mapping(ground), list(ground.bounds)
        out.add_item(item)
    out.normalize_and_save(str(folder), pystac.CatalogType.SELF_CONTAINED)
    return folder/'catalog.json'

def quarter(grid):
    "Labels on every fourth patch of 128 px, so that the measurement does not write a national data set"
    rows, columns = grid.shape
    y, x = np.meshgrid(grid.affine.f - 10*np.arange(rows) - 5, grid.affine.c + 10*np.arange(columns) + 5, indexing='ij')
    number = (x//300).astype(int)*1000 + (y//300).astype(int) % 1000
    keep = (x//1280 % 2 == 0) & (y//1280 % 2 == 0)
    return np.where(keep, number % 13 + 1, 14).astype('uint8'), np.where(keep, number % 100_000 + 1, 0).astype('int32')

PEAK = '''
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from test_patches import *
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; t = time.time()
out = build(sys.argv[2], sys.argv[3], Truth(quarter), LEGEND, Recipe(folds=3, block=2560), log=QUIET, workers=2)
print(json.dumps(dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, before=start/1024, patches=len(read_index(out)[0]),
                      dates=int(read_index(out)[0].dates.map(len).median()), seconds=time.time() - t)))
'''

def measure(folder, source, edge, dates):
    "Peak memory of a build in a process of its own, MB"
    catalog = grown(source, folder/f'{edge}_{dates}', edge, dates)
    run = subprocess.run([sys.executable, '-c', PEAK, str(Path(__file__).parent), str(catalog), str(folder/f'set_{edge}_{dates}')], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for p in (folder/f'{edge}_{dates}').glob('*.tif'): p.unlink()
    return json.loads(run.stdout.splitlines()[-1])

@pytest.mark.skipif(not os.environ.get('CROP2SEG_SLOW'), reason='slow: minutes; CROP2SEG_SLOW=1 runs it')
def test_peak_memory_does_not_grow_with_area(tmp_path):
    "A9"
    source = simulate(tmp_path/'s', size=128, dates=5, parcels=40, cloudy=.2, seed=1)
    small, large = (measure(tmp_path, source, edge, 40) for edge in (2000, 4000))
    print(small, large)
    assert large['peak'] < 2000 and large['peak'] < 1.15*small['peak'] and large['patches'] > 3*small['patches']
