"Sources of scenes: every real item and product, a STAC API on loopback, and attacks on each way in"
import contextlib, io, json, re, shutil, socketserver, sys, threading, types, warnings, zipfile
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
import numpy as np, pandas as pd, pystac, pytest, rasterio, shapely
from crop2seg import stac
from crop2seg.bands import BANDS
from crop2seg.cli import main
from crop2seg.cube import load_cube, open_cube
from crop2seg.harmonise import ledger
from crop2seg.observe import found
from crop2seg.ranges import Patience
from crop2seg.reading import read_window
from crop2seg.remote import check_address, gdal_options, hide, policy_of, sign
from crop2seg.request import Request
from crop2seg.safe import MAX_FILES, find_products, read_product
from crop2seg.season import Place, Season
from crop2seg.stac import ASSET_NAMES, band_assets, coarse, open_source, scene_table, search, tile_of
from odc.geo.geobox import GeoBox
from affine import Affine

real = Path(__file__).parents[2]/'shared'/'real'
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'no real imagery at {real.parent.name}/{real.name}')
ITEMS = sorted(p for p in (real/'stac_items').glob('*.json') if 'collection' not in p.name)
PRODUCTS = sorted((real/'safe').glob('*.SAFE'))
LOOPBACK = policy_of(['127.0.0.1'], http=True, private=True)

@contextlib.contextmanager
def serve(answer):
    "A server on loopback; answer(method, path, body) -> (status, headers, bytes). Yields its address and the requests it saw."
    seen = []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            seen.append((self.command, self.path, body))
            status, headers, data = answer(self.command, self.path, body)
            self.send_response(status)
            for k, v in {'Content-Length': str(len(data)), **headers}.items(): self.send_header(k, v)
            self.end_headers()
            if self.command != 'HEAD': self.wfile.write(data)
        do_POST = do_HEAD = do_GET
        def log_message(self, *a): pass
    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}', seen
        server.shutdown()

class Api:
    "Answers of a STAC API with pages of two, from {collection: [item dicts]}; it may be busy for its first requests."
    def __init__(self, collections, busy=()): self.collections, self.busy, self.base = collections, list(busy), None
    def __call__(self, method, path, body):
        if self.busy: return self.busy.pop(0), {'Retry-After': '0'}, b'busy'
        if method == 'GET': return self.json(dict(
            type='Catalog', id='loopback', stac_version='1.0.0', description='test', links=[
                dict(rel='self', href=self.base), dict(rel='search', href=f'{self.base}/search', type='application/geo+json', method='POST')],
            conformsTo=[f'https://api.stacspec.org/v1.0.0/{c}' for c in ('core', 'item-search')]))
        asked = json.loads(body); start = asked.get('page', 0); first, last = asked['datetime'].split('/')
        area = shapely.geometry.shape(asked['intersects'])
        found = [d for d in self.collections[asked['collections'][0]] if first <= d['properties']['datetime'] <= last
                 and shapely.geometry.shape(d['geometry']).intersects(area)]
        more = [dict(rel='next', href=f'{self.base}/search', method='POST', body=asked | {'page': start + 2})] * (start + 2 < len(found))
        return self.json(dict(type='FeatureCollection', features=found[start:start + 2], links=more))
    def json(self, body): return 200, {'Content-Type': 'application/json'}, json.dumps(body).encode()

def scene(day, tile='33UWR', name='S2A', host='https://sentinel-cogs.s3.us-west-2.amazonaws.com', **more):
    "An item as Earth Search has them"
    return dict(type='Feature', stac_version='1.0.0', stac_extensions=[], id=f'{name}_{tile}_{day.replace("-", "")}_0_L2A', collection='sentinel-2-l2a', links=[],
                bbox=[15, 49, 16, 50], geometry=shapely.geometry.mapping(shapely.box(15, 49, 16, 50)),
                properties={'datetime': f'{day}T10:10:31Z', 'grid:code': f'MGRS-{tile}', 'eo:cloud_cover': 10., 's2:processing_baseline': '05.00'} | more,
                assets={n[1]: dict(href=f'{host}/{name}/{day}/{n[1]}.tif') for n in ASSET_NAMES.values()})

@contextlib.contextmanager
def api(collections, busy=()):
    answer = Api(collections, busy)
    with serve(answer) as (base, seen): answer.base = base; yield base, seen

here, season = Place.from_bbox(15.2, 49.2, 15.3, 49.3), Season(2019)
days = [f'2019-{m:02d}-{d:02d}' for m in (4, 5, 6) for d in (3, 13)]

# --- every real item and product

@needs_real
@pytest.mark.parametrize('path', ITEMS, ids=lambda p: p.stem[:40])
def test_real_items_have_their_bands_and_tile(path):
    item = pystac.Item.from_file(str(path))
    keys = band_assets(item)
    assert set(keys) == {*BANDS, 'SCL'} and len(set(keys.values())) == 11
    for band, key in keys.items():                      # the asset is that band and no other: its file says so
        href = item.assets[key].href
        assert re.search(rf'(^|[/_]){band}[._]', href) or item.assets[key].extra_fields.get('eo:bands', [{}])[0].get('name', '').lower() in (band.lower(), key), (band, href)
    tile = tile_of(item)
    assert re.fullmatch(r'\d\d[C-X][A-Z]{2}', tile) and tile in path.name.replace('_T', '_')
    row = scene_table([item]).iloc[0]
    assert (row.scene, row.tile, row.missing) == (item.id, tile, '') and 0 <= row.cloud_cover <= 100

@needs_real
@pytest.mark.parametrize('path', [p for p in PRODUCTS if (p/'expected_output.json').exists() and 'MSIL2A' in p.name], ids=lambda p: p.stem[:30])
def test_products_agree_with_stactools(path):
    ours, theirs = read_product(path), pystac.Item.from_file(str(path/'expected_output.json'))
    a, b = shapely.geometry.shape(ours.geometry), shapely.geometry.shape(theirs.geometry)
    assert a.intersection(b).area / a.union(b).area > .9999 and np.allclose(ours.bbox, theirs.bbox, atol=1e-5)
    assert ours.datetime == theirs.datetime
    for name in ('proj:code', 'grid:code', 'eo:cloud_cover', 's2:processing_baseline', 's2:product_uri', 'platform', 'sat:relative_orbit'):
        assert ours.properties[name] == theirs.properties[name]
    offset = theirs.assets['red'].extra_fields['raster:bands'][0]['offset']
    assert ours.properties['crop2seg:boa_quantification_value'] == 10_000
    assert set(ours.properties['crop2seg:boa_add_offset'].values()) == ({-1000} if offset else set())      # 02.12 states none, and none is made up
    assert scene_table([ours]).missing[0].split() == list(ASSET_NAMES)                                      # metadata only: no asset is claimed

@needs_real
def test_grid_and_offset_of_each_band_agree_with_stactools(tmp_path):
    source = next(p for p in PRODUCTS if '20230625' in p.name)
    theirs = pystac.Item.from_file(str(source/'expected_output.json'))
    product = tmp_path/source.name
    shutil.copytree(source, product)
    names = [a.href for a in theirs.assets.values() if '/IMG_DATA/' in a.href]
    for n in names: (product/n).parent.mkdir(parents=True, exist_ok=True); (product/n).write_bytes(b'')
    ours = read_product(product)
    for band, keys in ASSET_NAMES.items():
        mine, other = ours.assets[keys[2]].extra_fields, theirs.assets[keys[1]].extra_fields
        assert mine['proj:shape'] == other['proj:shape'] and mine['proj:transform'] == other['proj:transform'] and mine['gsd'] == other['gsd']
        if band != 'SCL': assert [mine['raster:bands'][0][k] for k in ('scale', 'offset')] == [1e-4, -.1]

@needs_real
def test_level_1c_is_refused_in_one_sentence():
    path = next(p for p in PRODUCTS if 'MSIL1C' in p.name)
    with pytest.raises(ValueError, match='is a Level-1C product'): open_source(path)

@needs_real
def test_one_bad_product_costs_no_other(tmp_path, capsys):
    (tmp_path/'all').mkdir()
    for p in PRODUCTS: (tmp_path/'all'/p.name).symlink_to(p)
    (tmp_path/'all'/'S2A_MSIL2A_20190101T100000_N0211_R122_T33UVR_20190101T110000.zip').write_bytes(b'torn')
    items, _, rows = found(Request(tmp_path/'all', season=Season(2023)))
    last = rows.set_index('scene').reason
    assert len(rows) == len(items) + 2 and 'Level-1C' in last[next(s for s in last.index if 'MSIL1C' in s)]
    assert 'is not a zip' in last[next(s for s in last.index if '20190101' in s)]
    assert main(['scenes', '--source', str(tmp_path/'all')]) == 0 and 'Level-1C' in capsys.readouterr().out

@needs_real
def test_the_command_makes_a_preview(tmp_path, capsys):
    path = str(next(p for p in PRODUCTS if '20221005' in p.name))
    assert main(['cube', '--source', path, '--out', str(tmp_path/'ten.zarr')]) == 1 and 'has no B02' in capsys.readouterr().err
    assert main(['cube', '--source', path, '--out', str(tmp_path/'sixty.zarr'), '--pixel', '60']) == 0
    cube = open_cube(tmp_path/'sixty.zarr')
    assert cube.reflectance.shape == (1, 6, 1830, 1830) and cube.rio.resolution() == (60, -60)
    assert .02 < np.nanmedian(cube.reflectance.sel(band='B04').values[cube.scl.values == 4]) < .05
    files = pd.read_csv(tmp_path/'sixty.assets.csv')
    assert (files.status == 'kept').all() and (files.offset == -1000).all() and len(files) == 7
    assert main(['map', '--source', str(tmp_path/'sixty.zarr'), '--out', str(tmp_path/'map')]) == 1
    assert 'pixels of 60 m' in capsys.readouterr().err

def test_every_scene_says_its_offset_used_or_not():
    rows = found(Request('sample', season=Season(2011)))[2]
    assert (rows.status == 'dropped').all() and (rows.verdict == 'metadata').all() and rows.offset.notna().all()

def preview(item):
    item, season, bands = coarse(item), Season(2023), ('B02', 'B03', 'B04', 'B8A', 'B11', 'B12')
    rows = ledger([item], season, bands)
    assert rows.offset.tolist() == [-1000] and rows.status.tolist() == ['kept']
    return load_cube([item], rows, GeoBox((1830, 1830), Affine(60, 0, 499980, 0, -60, 5900040), 'EPSG:32629'), bands).compute()

@needs_real
def test_incomplete_product_is_a_ledger_entry_and_a_preview():
    path = next(p for p in PRODUCTS if '20221005' in p.name)
    item, = search(open_source(path))
    rows = ledger([item], Season(2023))
    assert rows.status.tolist() == ['dropped'] and 'has no B02, B03, B04, B05' in rows.reason[0]
    assert scene_table([item]).missing[0] == ' '.join(BANDS)
    cube = preview(item)
    seen = lambda scl, band: np.nanmedian(cube.reflectance.sel(band=band).values[cube.scl.values == scl])
    assert .02 < seen(4, 'B04') < .05 and .3 < seen(4, 'B8A') < .5 and .1 < seen(4, 'B11') < .2            # grass: dark red, bright near infrared
    assert 0 < seen(6, 'B8A') < .02 and 0 < seen(6, 'B12') < .02                                           # water is black there
    assert seen(9, 'B02') > .3                                                                             # cloud is bright
    with rasterio.open(next(path.rglob('*B04_60m.jp2'))) as f: dn = f.read(1)
    got = cube.reflectance.sel(band='B04').values[0]
    assert np.array_equal(np.isnan(got), dn == 0) and (dn == 0).mean() > .4                                # outside the swath nothing is made up
    assert np.allclose(got[dn > 0], (dn[dn > 0] - 1000.) / 1e4, atol=1e-6)                                 # and inside, pixel by pixel the file

@needs_real
def test_zipped_product_reads_the_same_without_unpacking(tmp_path):
    path = next(p for p in PRODUCTS if '20221005' in p.name)
    shutil.make_archive(tmp_path/path.stem, 'zip', path.parent, path.name)
    item, = search(open_source(tmp_path))
    assert all(a.href.startswith(f'/vsizip/{{{tmp_path}/') for a in item.assets.values())
    a, b = preview(item), preview(read_product(path))
    assert a.equals(b) and [p.name for p in tmp_path.iterdir()] == [f'{path.stem}.zip']

# --- products, made here

def product(folder, day, dn, offset=-1000, baseline='0400'):
    "A complete product of 120 x 120 m whose stored numbers are all `dn`, with the files and fields of a real one."
    name = f'S2A_MSIL2A_{day}T100031_N{baseline}_R122_T33UWR_{day}T164454'
    root = folder/f'{name}.SAFE'; granule = root/'GRANULE'/f'L2A_T33UWR_A038058_{day}T100025'
    granule.mkdir(parents=True)
    offsets = '' if offset is None else ''.join(f'<BOA_ADD_OFFSET band_id="{k}">{offset}</BOA_ADD_OFFSET>' for k in range(13))
    (root/'MTD_MSIL2A.xml').write_text(f'''<?xml version="1.0"?><n1:P xmlns:n1="https://psd-14.sentinel2.eo.esa.int"><PRODUCT_START_TIME>{day[:4]}-{day[4:6]}-{day[6:]}T10:00:31.024Z</PRODUCT_START_TIME>
<PROCESSING_BASELINE>{baseline[:2]}.{baseline[2:]}</PROCESSING_BASELINE><SPACECRAFT_NAME>Sentinel-2A</SPACECRAFT_NAME><SENSING_ORBIT_NUMBER>122</SENSING_ORBIT_NUMBER>
<BOA_QUANTIFICATION_VALUE>10000</BOA_QUANTIFICATION_VALUE>{offsets}<EXT_POS_LIST>49.66 14.99 49.66 15.01 49.64 15.01 49.64 14.99 49.66 14.99</EXT_POS_LIST>
<Cloud_Coverage_Assessment>12.5</Cloud_Coverage_Assessment></n1:P>''')
    (granule/'MTD_TL.xml').write_text('<T><HORIZONTAL_CS_CODE>EPSG:32633</HORIZONTAL_CS_CODE>' + ''.join(
        f'<Size resolution="{m}"><NROWS>{960//m}</NROWS><NCOLS>{960//m}</NCOLS></Size><Geoposition resolution="{m}"><ULX>499980</ULX><ULY>5500020</ULY></Geoposition>' for m in (10, 20)) + '</T>')
    for names in ASSET_NAMES.values():
        band, metres = names[2].split('_'); m = int(metres[:-1]); n = 960//m
        (granule/'IMG_DATA'/f'R{metres}').mkdir(parents=True, exist_ok=True)
        with rasterio.open(granule/'IMG_DATA'/f'R{metres}'/f'T33UWR_{day}T100031_{names[2]}.jp2', 'w', driver='JP2OpenJPEG', height=n, width=n, count=1, dtype='uint8' if band == 'SCL' else 'uint16',
                           crs='EPSG:32633', transform=Affine(m, 0, 499980, 0, -m, 5500020), QUALITY='100', REVERSIBLE='YES') as f: f.write(np.full((1, n, n), 4 if band == 'SCL' else dn, f.dtypes[0]))
    return root

def test_a_folder_of_products_becomes_a_cube(tmp_path):
    "Folder and zip, old baseline and new: one cube of the same reflectance, by the command"
    from crop2seg.cube import open_cube
    disk = tmp_path/'disk'
    product(disk, '20190412', 2000, None, '0211'); product(disk, '20190512', 3000, -1000, '0500')
    zipped = product(tmp_path, '20190612', 3000, -1000, '0500')
    shutil.make_archive(disk/zipped.stem, 'zip', tmp_path, zipped.name); shutil.rmtree(zipped)
    before = sorted(p.name for p in disk.iterdir())
    assert main(['cube', '--source', str(disk), '--season', '2019', '--out', str(tmp_path/'cube.zarr')]) == 0
    cube = open_cube(tmp_path/'cube.zarr').compute()
    assert cube.sizes['time'] == 3 and cube.offset.values.tolist() == [0, -1000, -1000] and (cube.sizes['y'], cube.sizes['x']) == (96, 96)
    assert np.allclose(cube.reflectance.values, .2, atol=1e-6) and cube.rio.transform() == Affine(10, 0, 499980, 0, -10, 5500020)
    assert sorted(p.name for p in disk.iterdir()) == before                                              # nothing was unpacked

def test_item_says_what_the_product_says(tmp_path):
    item = read_product(product(tmp_path, '20220512', 3000, -500, '0400'))
    assert {a.extra_fields['raster:bands'][0].get('offset') for k, a in item.assets.items() if not k.startswith('SCL')} == {-.05}   # as stated, not as expected
    assert item.properties['crop2seg:boa_add_offset']['B04'] == -500

# --- a STAC API

def test_pages_of_an_api_and_what_it_is_asked():
    with api({'sentinel-2-l2a': [scene(d) for d in days] + [scene('2016-05-03')]}) as (base, seen):
        source = open_source(base, LOOPBACK)
        items = search(source, here, season)
        assert [str(i.datetime.date()) for i in items] == days
        assert [str(i.datetime.date()) for i in search(source, here, Season(2019, start='2019-05-01', end='2019-05-31'))] == days[2:4]
        with pytest.raises(ValueError, match='no scene of this place'): search(source, Place.from_bbox(0, 0, 1, 1), season)
    assert len([s for s in seen if s[0] == 'POST']) == 3 + 1 + 1
    asked = json.loads(seen[1][2])
    assert asked['datetime'].startswith('2018-09-01T00:00:00Z/2019-10-31T') and asked['collections'] == ['sentinel-2-l2a']

def test_limits_of_a_search():
    items = [scene(d, **{'eo:cloud_cover': 15. * k}) for k, d in enumerate(days)] + [scene('2019-06-13', '33UXR')]
    with api({'sentinel-2-l2a': items}) as (base, _):
        source = open_source(base, LOOPBACK)
        assert len(search(source, here, season)) == 7
        assert [i.properties['eo:cloud_cover'] for i in search(source, here, season, max_cloud=30, tile='33UWR')] == [0, 15, 30]
        assert {i.datetime.month for i in search(source, here, season, months=(5, 6))} == {5, 6}
        assert [tile_of(i) for i in search(source, here, season, tile='t33uxr')] == ['33UXR']

def test_holes_of_the_preferred_collection_are_filled():
    c1 = [scene(d, name='C1') for d in days[:2]] + [scene(days[2], '33UXR', 'C1')]
    old = [scene(d) for d in days] + [scene(days[2], '33UXR')]
    with api({'sentinel-2-c1-l2a': c1, 'sentinel-2-l2a': old}) as (base, _):
        found = search(open_source(base, LOOPBACK), here, season, ('sentinel-2-c1-l2a', 'sentinel-2-l2a'))
    assert sorted(i.id[:3] for i in found) == ['C1_'] * 3 + ['S2A'] * 4                     # each tile and day once
    assert len({(tile_of(i), i.datetime) for i in found}) == 7 == len(found)

def test_busy_api_is_asked_again_and_a_dead_one_is_not_for_ever(monkeypatch):
    slept = []; monkeypatch.setattr('time.sleep', slept.append)
    with api({'sentinel-2-l2a': [scene(d) for d in days]}, busy=[503, 429]) as (base, seen):
        assert len(search(open_source(base, LOOPBACK), here, season)) == 6 and len(seen) > 3
    with serve(lambda *a: (500, {'Retry-After': '0'}, b'no')) as (base, seen):
        with pytest.raises(ValueError, match='does not answer as a STAC API'): open_source(base, LOOPBACK)
        assert len(seen) == 5
    with serve(lambda *a: (503, {'Retry-After': '86400'}, b'tomorrow')) as (base, seen):
        with pytest.raises(ValueError, match='does not answer as a STAC API'): open_source(base, LOOPBACK)
    assert 0 < max(slept) <= 60                                     # come back tomorrow, said the server

def test_scenes_of_real_catalogs_through_the_api():
    if not ITEMS: pytest.skip('no real imagery')
    docs = [json.loads(p.read_text()) for p in ITEMS if 'earthsearch_v1' in p.name]
    place = Place(shapely.geometry.shape(docs[0]['geometry']).centroid.buffer(.5))
    with api({'sentinel-2-l2a': docs}) as (base, _): found = search(open_source(base, LOOPBACK), place, Season(2023))
    assert {i.id for i in found} == {d['id'] for d in docs}
    assert set(scene_table(found).tile) == {'39QTA', '39QUA'}

# --- attacks

@pytest.mark.parametrize('address', ['http://127.0.0.1/', 'http://localhost/', 'http://2130706433/', 'http://0x7f000001/', 'http://0177.1/', 'http://[::1]/', 'http://10.1.2.3/',
                                     'http://[::ffff:10.0.0.1]/', 'http://169.254.169.254/latest/meta-data/', 'https://192.168.0.1/', 'http://0/', 'http://[fe80::1]/', 'http://[2002:7f00:1::]/'])
def test_private_addresses_need_a_word(address):
    with pytest.raises(ValueError, match='its own network'): check_address(address, policy_of(['*'], http=True))
    assert check_address(address, policy_of(['*'], http=True, private=True)) == address

def test_passwords_do_not_belong_in_an_address():
    for address in ('https://me:SECRET@earth-search.aws.element84.com/v1', 'https://SECRET@earth-search.aws.element84.com/v1'):
        with pytest.raises(ValueError, match='carries a name or a password') as e: check_address(address)
        assert 'SECRET' not in str(e.value)

def test_a_name_that_leads_inside(monkeypatch):
    monkeypatch.setattr('socket.getaddrinfo', lambda *a, **k: [(2, 1, 6, '', (ip, 0)) for ip in ('93.184.216.34', '10.0.0.1')])
    with pytest.raises(ValueError, match='its own network'): check_address('https://earth-search.aws.element84.com/v1')

def test_the_environment_opens_doors(monkeypatch):
    with pytest.raises(ValueError, match='CROP2SEG_ALLOW_HOSTS=stac.example.org'): check_address('https://stac.example.org/')
    monkeypatch.setenv('CROP2SEG_ALLOW_HOSTS', 'a.org, stac.example.org')
    monkeypatch.setattr('socket.getaddrinfo', lambda *a, **k: [(2, 1, 6, '', ('93.184.216.34', 0))])
    assert check_address('https://stac.example.org/')
    with pytest.raises(ValueError, match='CROP2SEG_ALLOW_HTTP=1'): check_address('http://stac.example.org/')

@pytest.mark.parametrize('name, value', [('GDAL_HTTP_UNSAFESSL', 'YES'), ('AWS_HTTPS', 'NO'), ('PYTHONHTTPSVERIFY', '0')])
def test_certificates_are_always_checked(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f'{name} turns off'): open_source('earth-search')

def test_redirect_of_a_search_to_another_host():
    with serve(lambda *a: (200, {}, b'{}')) as (inside, hit):
        target = inside.replace('127.0.0.1', 'localhost')
        with serve(lambda *a: (302, {'Location': target}, b'')) as (base, _):
            for where in (base, f'{base}/catalog.json'):
                with pytest.raises(ValueError, match='localhost is not among'): open_source(where, LOOPBACK)
        assert hit == []
        with serve(lambda m, p, b: (302, {'Location': f'/{len(p)}{p}'}, b'')) as (base, seen):
            with pytest.raises(ValueError, match='(?i)redirects'): open_source(base, LOOPBACK)
            assert len(seen) == 6                                   # the address and five steps

def test_next_page_on_another_host():
    with serve(lambda *a: (200, {}, b'{}')) as (inside, hit):
        answer = Api({'sentinel-2-l2a': [scene(d) for d in days]})
        with serve(lambda *a: (lambda s, h, d: (s, h, d.replace(b'"next", "href": "http://127.0.0.1', b'"next", "href": "http://localhost')))(*answer(*a))) as (base, _):
            answer.base = base
            with pytest.raises(ValueError, match='localhost is not among'): search(open_source(base, LOOPBACK), here, season)
        assert hit == []

@pytest.mark.parametrize('href', ['file:///etc/passwd', '/etc/passwd', '../../../../etc/passwd', '/vsicurl/http://10.0.0.1/x.tif', 'vrt:///etc/x.tif', 'http://169.254.169.254/x.tif'])
@pytest.mark.parametrize('band', ['red', 'scl'])
def test_remote_item_that_points_elsewhere(href, band):
    item = scene(days[0]); item['assets'][band]['href'] = href; item['links'] = [dict(rel='self', href='/home/me/item.json')]
    with api({'sentinel-2-l2a': [item]}) as (base, _):
        with pytest.raises(ValueError, match='is a file of this computer|is not opened|is not among') as e: search(open_source(base, LOOPBACK), here, season)
    assert item['id'] in str(e.value)

def static(base, child): # A static catalog with one link
    return json.dumps(dict(type='Catalog', id='far', stac_version='1.0.0', description='x', links=[dict(rel='item', href=child)])).encode()

def test_remote_catalog_that_links_to_a_file_of_this_disk(tmp_path):
    secret = tmp_path/'secret.json'; secret.write_text(json.dumps(scene(days[0])))
    for child in (secret.as_uri(), 'file://' + str(secret)):
        with serve(lambda *a: (200, {}, static('', child))) as (base, _):
            with pytest.raises(ValueError, match='is a file of this computer'): search(open_source(f'{base}/catalog.json', LOOPBACK))

def test_local_catalog_with_a_remote_item(tmp_path):
    answers = {'/good.json': scene(days[0]), '/bad.json': scene(days[0], host='file:///home/me'), '/root.json': scene(days[0], host='/home/me')}
    with serve(lambda m, p, b: (200, {}, json.dumps(answers[p]).encode())) as (base, _):
        for name in ('good', 'bad', 'root'): (tmp_path/f'{name}.json').write_bytes(static('', f'{base}/{name}.json'))
        assert len(search(open_source(tmp_path/'good.json', LOOPBACK))) == 1
        with pytest.raises(ValueError, match='is a file of this computer'): search(open_source(tmp_path/'bad.json', LOOPBACK))
        root, = search(open_source(tmp_path/'root.json', LOOPBACK))
        assert root.assets['red'].get_absolute_href().startswith(f'{base}/home/me')          # a path means a path on that server
        with pytest.raises(ValueError, match='does not begin with https'): search(open_source(tmp_path/'good.json'))

def test_local_catalog_may_name_files_anywhere_on_the_disk(tmp_path):
    (tmp_path/'catalog.json').write_bytes(static('', './item.json'))
    (tmp_path/'item.json').write_text(json.dumps(scene(days[0], host='/data/elsewhere')))
    assert search(open_source(tmp_path))[0].assets['red'].href.startswith('/data/elsewhere')

def pack(path, *entries):
    with warnings.catch_warnings(action='ignore'), zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in entries: z.writestr(name, content)
    return path

NAME = 'S2A_MSIL2A_20190212T192651_N0212_R013_T07HFE_20201007T160857'

@pytest.mark.parametrize('evil', ['../../evil.jp2', '/tmp/evil.jp2', f'{NAME}.SAFE/../../evil.jp2', 'C:evil.jp2', 'a\\..\\b'])
def test_zip_slip(tmp_path, evil):
    pack(tmp_path/f'{NAME}.zip', (f'{NAME}.SAFE/MTD_MSIL2A.xml', '<a/>'), (evil, 'x'))
    with pytest.raises(ValueError, match='leads out of it'): open_source(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f'{NAME}.zip']

def test_zip_bombs(tmp_path):
    path = tmp_path/f'{NAME}.zip'
    pack(path, (f'{NAME}.SAFE/MTD_MSIL2A.xml', bytes(40_000_000)))
    with pytest.raises(ValueError, match='times its size'): open_source(path)
    pack(path, *((f'{NAME}.SAFE/{k}', '') for k in range(MAX_FILES + 1)))
    with pytest.raises(ValueError, match='5001 files'): open_source(path)
    path.write_bytes(b'PK\3\4 no zip')
    with pytest.raises(ValueError, match='is not a zip'): open_source(path)

def test_zip_that_lies_about_its_sizes(tmp_path):
    path = pack(tmp_path/f'{NAME}.zip', (f'{NAME}.SAFE/MTD_MSIL2A.xml', bytes(40_000_000)), (f'{NAME}.SAFE/GRANULE/L/MTD_TL.xml', '<a/>'))
    data = path.read_bytes().replace((40_000_000).to_bytes(4, 'little'), (40).to_bytes(4, 'little'))
    path.write_bytes(data)
    with pytest.raises((ValueError, zipfile.BadZipFile)): open_source(path)

BOMB = '<!DOCTYPE b [<!ENTITY a "ha">' + ''.join(f'<!ENTITY {c} "{f"&{p};" * 10}">' for p, c in zip('abcdefgh', 'bcdefghi')) + ']><b>&i;</b>'

@pytest.mark.parametrize('xml', [BOMB, '<!DOCTYPE b [<!ENTITY a SYSTEM "file:///etc/passwd">]><b>&a;</b>'], ids=['billion laughs', 'external entity'])
@pytest.mark.parametrize('packed', [True, False])
def test_xml_bombs(tmp_path, xml, packed):
    files = ((f'{NAME}.SAFE/MTD_MSIL2A.xml', xml), (f'{NAME}.SAFE/GRANULE/L/MTD_TL.xml', '<a/>'))
    if packed: pack(tmp_path/f'{NAME}.zip', *files)
    else:
        for name, content in files: (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_text(content)
    with pytest.raises(ValueError, match=r'MTD_MSIL2A.xml cannot be read \(DTDForbidden\)'): open_source(tmp_path)

def test_vrt_named_tif(tmp_path):
    with warnings.catch_warnings(action='ignore'), rasterio.open(tmp_path/'secret.tif', 'w', driver='GTiff', width=4, height=4, count=1, dtype='uint8') as f: f.write(np.full((1, 4, 4), 7, 'uint8'))
    (tmp_path/'B04.tif').write_text('<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>'
                                    f'{tmp_path}/secret.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>')
    with warnings.catch_warnings(action='ignore'), rasterio.open(tmp_path/'B04.tif') as f: assert f.read().max() == 7          # the trap is real
    grid = GeoBox((4, 4), Affine(10, 0, 0, 0, -10, 0), 'EPSG:32633')
    with pytest.raises(ValueError, match='is VRT'): read_window(str(tmp_path/'B04.tif'), grid)
    with pack(tmp_path/'z.zip', ('B04.tif', (tmp_path/'B04.tif').read_text())).open('rb'):
        with pytest.raises(ValueError, match='cannot be read'): read_window(f'/vsizip/{{{tmp_path}/z.zip}}/B04.tif', grid)      # no driver but GTiff is tried

def test_redirect_of_an_image():
    image = io.BytesIO(b'II*\0' + bytes(40)).getvalue()
    with serve(lambda *a: (200, {}, image)) as (inside, hit), serve(lambda *a: (302, {'Location': inside.replace('127.0.0.1', 'localhost')}, b'')) as (base, _):
        with pytest.raises(ValueError, match='localhost is not among'): read_window(f'{base}/B04.tif', GeoBox((4, 4), Affine(10, 0, 0, 0, -10, 0), 'EPSG:32633'), patience=Patience(policy=LOOPBACK))
        assert hit == []

# --- secrets

SIGNED = 'sv=2024&sig=SECRETSIGNATURE%3D'

def test_no_secret_in_a_message(capsys, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    monkeypatch.setenv('CROP2SEG_ALLOW_HOSTS', '127.0.0.1'); monkeypatch.setenv('CROP2SEG_ALLOW_HTTP', '1'); monkeypatch.setenv('CROP2SEG_ALLOW_PRIVATE', '1')
    with serve(lambda m, p, b: (404, {}, f'no {p}'.encode())) as (base, _):
        said = []
        for where in (f'{base}/v1?{SIGNED}', f'{base}/catalog.json?{SIGNED}', f'https://me:SECRET@127.0.0.1/v1', f'https://other.org/v1?{SIGNED}', f'http://127.0.0.1:9/v1?{SIGNED}'):
            with pytest.raises(ValueError) as e: open_source(where)
            said.append(str(e.value) + ''.join(str(c) for c in (e.value.__cause__,) if c))
            assert main(['cube', '--source', where, '--bbox', '15,49,15.1,49.1', '--season', '2019', '--out', 'x.zarr']) == 1
        for where in (base, 'http://127.0.0.1:9'):
            with pytest.raises(ValueError) as e: read_window(f'{where}/B04.tif?{SIGNED}', GeoBox((4, 4), Affine(10, 0, 0, 0, -10, 0), 'EPSG:32633'), patience=Patience(retries=1, pause=.01))
            said.append(str(e.value))
    text = ' '.join([*said, *capsys.readouterr()])
    assert 'SECRET' not in text and '127.0.0.1' in text

def test_addresses_are_signed_when_read_and_never_kept(monkeypatch):
    asked, cache = [], {'token': 'old'}
    sas = types.SimpleNamespace(TOKEN_CACHE=cache, sign_url=lambda u: asked.append(u) or f'{u}?{SIGNED}')
    monkeypatch.setitem(sys.modules, 'planetary_computer.sas', sas)
    href = 'https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/B04.tif'
    assert sign(href) == f'{href}?{SIGNED}' and sign(f'{href}?{SIGNED}') == f'{href}?{SIGNED}' and asked == [href, href]
    assert cache and sign(href, renew=True) and not cache
    assert sign('https://sentinel-cogs.s3.us-west-2.amazonaws.com/B04.tif').endswith('.tif')
    assert SIGNED not in hide(sign(href))
    monkeypatch.setitem(sys.modules, 'planetary_computer.sas', None)
    with pytest.raises(ValueError, match='pip install planetary-computer'): sign(href)

def test_the_real_library_signs():
    sas = pytest.importorskip('planetary_computer.sas', reason='planetary-computer is not installed')
    href = 'https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/B04.tif'
    token = {'msft:expiry': datetime.now(timezone.utc) + timedelta(hours=1), 'token': SIGNED}
    sas.TOKEN_CACHE['https://planetarycomputer.microsoft.com/api/sas/v1/token/sentinel2l2a01/sentinel2-l2'] = sas.SASToken(**token)
    try: assert sign(href) == f'{href}?{SIGNED}'
    finally: sas.TOKEN_CACHE.clear()

def test_planetary_computer_without_its_library(monkeypatch):
    monkeypatch.setattr('crop2seg.stac.find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install planetary-computer'): open_source('planetary-computer')

def test_keys_come_from_the_environment_or_netrc(monkeypatch, tmp_path):
    for k in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(ValueError, match='asks for keys'): gdal_options('s3://eodata/Sentinel-2/B04.jp2')
    (tmp_path/'.netrc').write_text('machine eodata.dataspace.copernicus.eu login KEY password SECRET\n'); (tmp_path/'.netrc').chmod(0o600)
    options = gdal_options('s3://eodata/Sentinel-2/B04.jp2')
    assert (options['AWS_ACCESS_KEY_ID'], options['AWS_SECRET_ACCESS_KEY'], options['GDAL_HTTP_UNSAFESSL']) == ('KEY', 'SECRET', 'NO')
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'ENV'); monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'ENVSECRET')
    assert gdal_options('s3://eodata/x.jp2')['AWS_ACCESS_KEY_ID'] == 'ENV'
    assert 'AWS_ACCESS_KEY_ID' not in gdal_options('https://sentinel-cogs.s3.us-west-2.amazonaws.com/B04.tif')       # keys go to their archive only

def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'): open_source(tmp_path/'nothing')
    with pytest.raises(FileNotFoundError, match='folder of products'): open_source(tmp_path)
    with pytest.raises(ValueError, match='is a saved cube'): open_source(tmp_path/'cube.zarr')
    assert find_products(tmp_path) == []

def test_a_catalog_that_bites_its_tail_and_one_without_end(tmp_path, monkeypatch):
    top = pystac.Catalog('top', 'a'); top.add_child(low := pystac.Catalog('low', 'b'))
    top.normalize_and_save(str(tmp_path/'ring'), pystac.CatalogType.SELF_CONTAINED)
    path = next((tmp_path/'ring').rglob('low/catalog.json')); told = json.loads(path.read_text())
    told['links'].append(dict(rel='child', href='../catalog.json')); path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match='linked from below itself'): search(open_source(tmp_path/'ring'))
    monkeypatch.setattr(stac, '_MOST_ITEMS', 30); monkeypatch.setattr(stac, '_MOST_BYTES', 2**20)
    def answer(method, path, body):
        if path.startswith('/large'): return 200, {}, b'{' + b' '*2**21
        if method == 'GET': return endless(method, path, body)
        features = [scene('2019-05-01', name=f'S{len(seen)}{k}') for k in range(10)]
        return endless.json(dict(type='FeatureCollection', features=features, links=[dict(rel='next', href=f'{base}/search', method='POST', body={})]))
    with serve(answer) as (base, seen):
        endless = Api({}); endless.base = base
        with pytest.raises(ValueError, match='more than 30 scenes'): search(open_source(base, LOOPBACK), here, season)
        with pytest.raises(ValueError, match='larger than 1 MB'): open_source(f'{base}/large.json', LOOPBACK)
    assert len(seen) < 20

def test_20_m_bands_under_their_plain_names(capsys, tmp_path):
    assert main(['cube', '--source', 'sample', '--pixel', '20', '--out', str(tmp_path/'twenty.zarr'), '--months', '5']) == 0
    cube = open_cube(tmp_path/'twenty.zarr')
    assert cube.rio.resolution() == (20, -20) and cube.band.values.tolist() == ['B05', 'B06', 'B07', 'B8A', 'B11', 'B12']
    assert main(['cube', '--source', 'sample', '--bands', 'B04,B08', '--out', str(tmp_path/'two.zarr'), '--months', '5']) == 0
    assert open_cube(tmp_path/'two.zarr').band.values.tolist() == ['B04', 'B08']
