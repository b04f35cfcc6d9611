"The same number means the same reflectance: seasons whose metadata are wrong, missing or contradictory"
from pathlib import Path
import dask, numpy as np, pystac, pytest, rasterio
from dask.distributed import Client
from odc.geo.geobox import GeoBox
from crop2seg.bands import BANDS, SCALE
from crop2seg.cube import load_cube, native_grid
from crop2seg.harmonise import decide, ledger
from crop2seg.season import Season
from crop2seg.stac import band_assets, open_source, search
from crop2seg.reading import read_window
from crop2seg.verify import WITNESSES, look_of, offsets_seen, verify

real = Path(__file__).parents[2]/'shared'/'real'
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'no real imagery at {real.parent.name}/{real.name}')
season = Season(2019)

def say(item, base=None, flag=None, offset=None):
    "Replace what a scene says of its offset"
    item = item.clone()
    for k in [k for k in item.properties if 'baseline' in k or k.endswith('boa_offset_applied') or 'product' in k]: del item.properties[k]
    item.properties |= {k: v for k, v in {'s2:processing_baseline': base, 'earthsearch:boa_offset_applied': flag}.items() if v is not None}
    for a in item.assets.values():
        a.href = a.get_absolute_href()
        a.extra_fields.pop('raster:bands', None)
        if offset is not None: a.extra_fields['raster:bands'] = [dict(nodata=0, scale=1e-4, offset=offset)]
    return item

LIES = { # What a catalog says of a scene that carries the 1000, and of one that does not
    'silent': (dict(), dict()),
    'old baseline for all': (dict(base='02.12'), dict(base='02.12')),
    'new baseline for all': (dict(base='05.10'), dict(base='05.10')),
    'the opposite': (dict(base='02.12', offset=0), dict(base='05.10', offset=-.1)),
    'baseline against raster': (dict(base='05.10', offset=0), dict(base='02.12', offset=-.1)),
    'flag and offset for all': (dict(base='05.10', flag=True, offset=-.1), dict(base='05.10', flag=True, offset=-.1)),
    'only the shifted are silent': (dict(), dict(base='02.12'))}

@pytest.fixture(scope='module')
def clean():
    "The sample, its grid and its cube"
    items = search(open_source('sample')); grid = native_grid(items)
    return items, grid, load_cube(items, ledger(items, season), grid).compute()

@pytest.fixture(scope='module')
def shifted(clean, tmp_path_factory):
    "A copy of the sample whose every second scene is stored with 1000 added; 0 stays 0"
    out, copies = tmp_path_factory.mktemp('shifted'), []
    for k, item in enumerate(clean[0]):
        item = say(item)
        for band, key in band_assets(item).items() if k % 2 else ():
            if band == 'SCL': continue
            with rasterio.open(item.assets[key].href) as f: dn, profile = f.read(1), f.profile
            path = out/item.id/f'{band}.tif'; path.parent.mkdir(exist_ok=True)
            profile.update(driver='COG', nodata=0); [profile.pop(p, None) for p in ('blockxsize', 'blockysize', 'tiled', 'interleave')]
            with rasterio.open(path, 'w', **profile) as f: f.write(np.where(dn > 0, dn + 1000, 0).astype('uint16'), 1)
            item.assets[key].href = str(path)
        copies.append(item)
    return copies

@pytest.mark.parametrize('lie', LIES)
def test_cube_equals_the_clean_one_or_names_what_it_refuses(lie, clean, shifted):
    items, grid, truth = clean
    told = [say(i, **LIES[lie][0 if k % 2 else 1]) for k, i in enumerate(shifted)]
    before = ledger(told, season)
    rows = verify(told, before, grid)
    kept = rows.status == 'kept'
    assert list(rows.scene) == [i.id for i in items] and kept.sum() >= 24
    assert rows.reason[~kept].str.startswith('ambiguous offset: ').all() and rows.offset[~kept].isna().all()
    assert rows.offset[kept].tolist() == [(0, -1000)[k % 2] for k in rows.index[kept]]
    assert set(rows.verdict[kept]) <= {'metadata', 'pixels'}
    cube = load_cube([i for i, k in zip(told, kept) if k], rows, grid).compute()
    same = truth.sel(time=cube.time)
    assert list(cube.time.values) == list(rows.day[kept].values)
    assert np.array_equal(np.isnan(cube.reflectance), np.isnan(same.reflectance))
    # Where resampling would undershoot, the clean cube is cut off at 0 by the reader's own integers; the shifted one is not
    assert np.abs(cube.reflectance.clip(SCALE) - same.reflectance.clip(SCALE)).max() <= 1.01*SCALE

@pytest.mark.parametrize('lie', ['silent', 'baseline against raster', 'flag and offset for all'])
def test_nothing_doubtful_enters_a_cube_unasked(lie, clean, shifted):
    told = [say(i, **LIES[lie][0 if k % 2 else 1]) for k, i in enumerate(shifted)]
    with pytest.raises(ValueError, match='not decided.*let verify ask'): load_cube(told, ledger(told, season), clean[1])

def test_what_every_catalog_says_rightly_stays(clean):
    items, grid, _ = clean
    for says, add, offset in (('02.12', 0, 0), ('05.10', 1000, -1000)):
        told = [say(i, says) for i in items]
        def read(href, geobox):
            x = read_window(href, geobox, 'nearest')
            return x if 'SCL' in href else np.where(x > 0, x + add, 0).astype('uint16')
        rows = verify(told, ledger(told, season), grid, read=read)
        assert (rows.status == 'kept').all() and (rows.offset == offset).all() and (rows.verdict == 'metadata').all()

def test_negative_reflectance_survives_and_zero_stays_missing(clean):
    items, grid, _ = clean
    told = [say(i, '05.10') for i in items]
    def read(href, geobox): # two dark corners, one of them missing
        x = read_window(href, geobox, 'nearest').astype(int) + 1000*('SCL' not in href)
        if 'SCL' not in href: x[:4, :4], x[-4:, -4:] = 940, 0
        return x.astype('uint16')
    rows = verify(told, ledger(told, season), grid, read=read)
    assert (rows.offset == -1000).all()

def test_schedulers_agree(clean, shifted):
    before, found = ledger(shifted[:8], season), []
    with Client(n_workers=1, threads_per_worker=1, dashboard_address=None): found.append(verify(shifted[:8], before, clean[1]))
    for scheduler in ('synchronous', 'threads', 'processes'):
        with dask.config.set(scheduler=scheduler, num_workers=2): found.append(verify(shifted[:8], before, clean[1]))
    assert all(found[0].equals(f) for f in found[1:])

ITEMS = {'S2A_28QCH': (0, 'metadata'), 'S2B_MSIL2A_20190629': (0, 'metadata'), 'stactools_S2A': (-1000, 'metadata'),
         'stactools_S2B': (-1000, 'metadata'), 'earthsearch_v1': (0, 'contested')}

@needs_real
@pytest.mark.parametrize('path', sorted((real/'stac_items').glob('*.json')) if real.is_dir() else [], ids=lambda p: p.stem[:40])
def test_real_items(path):
    if 'collection' in path.name: pytest.skip('a collection, no item')
    item = pystac.Item.from_file(str(path)); keys = band_assets(item)
    assert set(keys) == {*BANDS, 'SCL'} and not [k for k in keys.values() if 'jp2' in k]
    found = decide(item)
    assert (found.offset, found.verdict) == next(v for k, v in ITEMS.items() if path.name.startswith(k))

@needs_real
@pytest.mark.parametrize('path', sorted((real/'safe').glob('*L2A*/expected_output.json')) if real.is_dir() else [], ids=lambda p: p.parent.name[:26])
def test_real_products(path):
    found = decide(pystac.Item.from_file(str(path)))
    assert (found.offset, found.verdict) == (0 if '_N02' in path.parent.name else -1000, 'metadata')

@needs_real
@pytest.mark.parametrize('carries', [False, True], ids=['already subtracted', 'flag is wrong'])
def test_contested_items_are_corrected_once(carries, clean):
    "The metadata of a real contested item on pixels that are, and are not, corrected"
    items, grid, _ = clean
    model = pystac.Item.from_file(str(real/'stac_items'/'earthsearch_v1_S2B_39QTA_20230623_0_L2A.json'))
    told = [i.clone() for i in items]
    for i in told:
        for key, a in i.assets.items():
            a.href = a.get_absolute_href()
            if key in model.assets: a.extra_fields['raster:bands'] = model.assets[key].extra_fields['raster:bands']
        i.properties |= {k: v for k, v in model.properties.items() if 's2:' in k or 'earthsearch:' in k}
    def read(href, geobox):
        x = read_window(href, geobox, 'nearest')
        return x if 'SCL' in href or not carries else np.where(x > 0, x + 1000, 0).astype('uint16')
    rows = verify(told, ledger(told, season), grid, read=read); kept = rows.status == 'kept'
    assert (rows.offset[kept] == (-1000 if carries else 0)).all() and kept.sum() >= (12 if carries else 36)

@needs_real
def test_the_real_product_with_offset_is_never_called_without():
    "Baseline 04.00 over Ireland, 60 m: whole, from its coarse levels, and in windows of 64 pixels"
    folder = next((real/'safe').glob('S2A_MSIL2A_20221005*/GRANULE/*/IMG_DATA/R60m')); find = lambda b: str(next(folder.glob(f'*_{b}_60m.jp2')))
    with rasterio.open(find('B02')) as f: grid = GeoBox(f.shape, f.transform, f.crs.to_wkt())
    bands = ('B02', 'B04', 'B8A', 'B11', 'B12')
    full, coarse = (np.stack([read_window(find(b), g, 'nearest') for b in (*bands, 'SCL')]) for g in (grid, grid.zoom_out(19)))
    rng = np.random.default_rng(0); windows = [full[:, i:i + 64, j:j + 64] for i, j in rng.integers(0, 1766, (200, 2))]
    looks = [look_of(w[:-1], w[-1]) for w in (coarse, *windows)]
    assert sum(np.isfinite(l.dark).all() for l in looks) > 100 and not [l.dark for l in looks if l.dark.min() < 750]
    assert {o for o, _ in offsets_seen(looks[:1], bands)} == {None}                 # one scene is no season

@pytest.fixture(scope='module')
def flanders():
    "Samples of 118 real scenes without offset"
    items = search(open_source(real/'flanders_2018'/'catalog.json')); few = native_grid(items).zoom_out(2)
    return [np.stack([read_window(i.assets[k].get_absolute_href(), few, 'nearest') for k in band_assets(i, WITNESSES).values()]) for i in items]

@needs_real
@pytest.mark.parametrize('edge', [32, 16, 8])
@pytest.mark.parametrize('share', [0, .5, 1])
def test_real_pixels_are_never_wrong(edge, share, flanders):
    rng, right, usable = np.random.default_rng(edge), 0, 0
    for _ in range(1 if edge == 32 and share in (0, 1) else 3):
        which, (i, j) = rng.random(118) < share, rng.integers(0, 33 - edge, 2)
        parts = [s[:, i:i + edge, j:j + edge].astype(int) for s in flanders]
        looks = [look_of(np.where(p[:-1] > 0, p[:-1] + 1000*w, 0), p[-1]) for p, w in zip(parts, which)]
        seen, true = [o for o, _ in offsets_seen(looks)], -1000*which
        assert not [k for k, (s, t) in enumerate(zip(seen, true)) if s is not None and s != t]
        right += sum(s is not None and l.clear.mean() > .5 for s, l in zip(seen, looks)); usable += sum(l.clear.mean() > .5 for l in looks)
    assert right >= usable*{32: (.99, .85, .8), 16: (.95, .85, .7), 8: (.85, .35, 0)}[edge][int(2*share)]

@needs_real
def test_real_season_keeps_its_ledger(tmp_path):
    items = search(open_source(real/'flanders_2018'/'catalog.json'))
    before = ledger(items, Season(2018, start='2017-08-01', end='2018-11-30')); rows = verify(items, before, native_grid(items))
    assert rows[before.columns].equals(before)
