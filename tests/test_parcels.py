"Parcels: codes of whole countries, real Czech and Flemish parcels, registers of any format and size"
import warnings
from pathlib import Path
import geopandas as gpd, numpy as np, pandas as pd, pyogrio, pytest, rasterio, shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import Polygon, box
from crop2seg.crops import classify, hcat_classes, read_codebook, read_mapping
from crop2seg.legend import data_dir, read_legend
from crop2seg.outlines import open_outlines, within
from crop2seg.parcels import border_distance, burn, open_parcels, read_parcels

real = Path(__file__).parents[2]/'shared'/'real'
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'no real data at {real.parent.name}/{real.name}')
mappings, legend = data_dir()/'legends'/'mappings', read_legend()
LISTS = {'Czechia 2023': 'cz_2023', 'Flanders 2021': 'be_vlg_2021', 'Austria 2021': 'at_2021', 'Slovakia 2021': 'sk_2021'}

def square(x, y, side, crs='EPSG:32633'): return GeoBox((side, side), Affine(10, 0, x, 0, -10, y), crs)

# --- codes

@needs_real
def test_every_hcat_node_and_czech_code_has_a_decision():
    nodes = pd.read_csv(real/'hcat'/'HCAT3.csv', dtype=str)
    ours = pd.read_csv(mappings/'hcat'/'nodes.csv', dtype=str)
    assert dict(zip(nodes.HCAT3_code, nodes.HCAT3_name)) == dict(zip(ours.code, ours.name))
    assert hcat_classes(list(nodes.HCAT3_code)).class_id.isin(legend.ids).all()
    czech, table = pd.read_csv(real/'hcat'/'cz_2023.csv', dtype=str), read_codebook('czechia', ['PLODINA_ID'], legend).table
    assert set(czech.original_code) == set(table.index) and len(table) == 326
    assert (table.hcat[czech.original_code].values == czech.HCAT3_code.values).all()
    assert table.class_id.isin(legend.ids).all() and (table.decision != '').all()

@needs_real
def test_coverage_of_country_lists_is_as_told():
    told = pd.read_csv(data_dir()/'results'/'crops_coverage.csv').set_index('list')
    for name, file in LISTS.items():
        own = file == 'cz_2023'
        table = read_mapping(mappings/'hcat'/'czechia.csv' if own else real/'hcat'/f'{file}.csv', legend)
        known = table.class_id[table.class_id != legend.void]
        assert told.loc[name].tolist() == [len(table), known.nunique(), len(known), len(table) - len(known), 0], name

def test_no_rule_falls_through_to_a_group():
    "A leaf of arable or permanent crops is decided by a rule of its own branch, never by the group above all"
    nodes = pd.read_csv(mappings/'hcat'/'nodes.csv', dtype=str)
    decided = hcat_classes(list(nodes.code))
    assert (decided.prefix.str.len() >= 6)[decided.index.str[:4].isin(['3301', '3303'])].all()

def test_licences_stand_beside_the_tables():
    notice = (mappings/'hcat'/'NOTICE.md').read_text()
    assert all(f.name in notice for f in (mappings/'hcat').glob('*.csv')) and 'CC BY-SA 4.0' in notice

# --- real parcels

@needs_real
def test_the_hundred_czech_parcels_map_without_an_unknown():
    source = open_parcels(real/'czech_parcels'/'cz_declared_2024_100.gpkg')
    assert len(source) == 100 and source.decisions.parcels.sum() == 100
    assert set(source.decisions.codebook) == {'czechia'}
    by_class = pd.Series(source.classes).map(lambda c: legend.short[c]).value_counts()
    assert by_class['Winter cereals'] == 16 and by_class['Rapeseed'] == 12 and by_class['Maize'] == 7
    assert set(source.decisions[source.decisions.class_id == legend.void].code) == {'459', '463'}

@needs_real
def test_a_czech_parcel_lands_on_its_pixels():
    path = real/'czech_parcels'/'cz_declared_2024_100.gpkg'
    table = gpd.read_file(path).to_crs(32633)
    source, k = open_parcels(path, name='ZAKRES_ID'), int(table.area.argmax())
    west, south, east, north = (table.geometry[k].bounds // np.array([10, 10, 10, 10])*10).astype(int)
    grid = square(int(west) - 50, int(north) + 60, int(max(east - west, north - south)//10 + 12))
    near = source.window(grid)
    labels, ids = burn(near, grid, outside=legend.void)
    assert abs((ids == k + 1).sum()*100/table.area[k] - 1) < .02
    assert near.ZAKRES_ID[near.parcel_id == k + 1].tolist() == [table.ZAKRES_ID[k]]
    assert abs(near.area[near.parcel_id == k + 1].iloc[0]/1e4 - table.ZAKRES_VYM[k]) < .05*table.ZAKRES_VYM[k]   # the declared area
    assert set(labels[ids == k + 1]) == {source.classes[k]}

@needs_real
def test_flemish_parcels_by_window_are_the_labels():
    with rasterio.open(real/'flanders_2018'/'labels.tif') as f: raster, grid = f.read(1), GeoBox(f.shape, f.transform, f.crs.to_wkt())
    source = open_parcels(real/'flanders_2018'/'parcels.gpkg')
    labels, ids = burn(source.window(grid), grid, legend.void)
    whole = burn(read_parcels(real/'flanders_2018'/'parcels.gpkg', legend), grid, legend.void)
    same = ids == whole[1]
    assert np.array_equal(labels[same], whole[0][same]) and same.mean() > .999
    assert np.array_equal(labels, np.where(raster == 0, legend.void, raster))

# --- registers

@pytest.fixture(scope='module')
def register(tmp_path_factory):
    "400 parcels with overlaps, slivers, a bow tie and a hole in the numbering, in every format"
    rng, here = np.random.default_rng(5), tmp_path_factory.mktemp('register')
    x, y = 500_000 + rng.integers(0, 3000, 400), 5_500_000 + rng.integers(0, 3000, 400)
    w, h = rng.integers(30, 260, (2, 400))
    shapes = [box(a + .3, b + .3, a + c + .3, b + d + .3) for a, b, c, d in zip(x, y, w, h)]
    shapes[7] = Polygon([(500_000, 5_500_000), (500_400, 5_500_300), (500_400, 5_500_000), (500_000, 5_500_300)])
    shapes[8] = box(500_100, 5_500_100, 501_900, 5_500_106)
    table = gpd.GeoDataFrame({'NC': rng.choice([115, 311, 400, 451, 603], 400), 'who': np.arange(400)}, geometry=shapes, crs=32633)
    table.to_file(here/'r.gpkg'), table.to_file(here/'r.shp'), table.to_file(here/'r.fgb', SPATIAL_INDEX='NO')
    table.to_crs(4326).to_file(here/'r.geojson', COORDINATE_PRECISION=12)
    table.to_parquet(here/'r.parquet'), table.to_parquet(here/'b.parquet', write_covering_bbox=True, row_group_size=64)
    return here, table

FORMATS = 'r.gpkg', 'r.shp', 'r.fgb', 'r.geojson', 'r.parquet', 'b.parquet'

@pytest.mark.parametrize('name', FORMATS)
def test_every_format_gives_the_same_pixels(register, name):
    here, _ = register
    first, source = open_parcels(here/'r.gpkg'), open_parcels(here/name)
    for x, y in ((500_000, 5_501_280), (501_280, 5_503_000), (502_500, 5_500_640)):
        grid = square(x, y, 64)
        for a, b in zip(burn(first.window(grid), grid, 0), burn(source.window(grid), grid, 0)): assert (a != b).mean() < .001

def test_windows_agree_where_they_overlap(register):
    source = open_parcels(register[0]/'r.gpkg', codes='bavaria', buffer=10)
    big, small = square(500_500, 5_502_500, 200), square(501_000, 5_502_000, 64)
    results = []
    for grid in (big, small):
        near = source.window(grid)
        labels, ids = burn(near, grid, 14)
        results.append((labels, ids, border_distance(near, ids, grid)))
    for a, b in zip(*results): assert np.allclose(a[50:114, 50:114], b, atol=.01)

def test_the_order_of_the_file_does_not_matter(register, tmp_path):
    here, table = register
    shuffled = table.sample(frac=1, random_state=1)
    shuffled.to_file(tmp_path/'s.gpkg')
    grid = square(500_000, 5_503_200, 320)
    (a, i), (b, j) = (burn(open_parcels(p).window(grid), grid, 0) for p in (here/'r.gpkg', tmp_path/'s.gpkg'))
    assert np.array_equal(a, b)
    rows = np.append(-1, shuffled.index)                                    # row of the shuffled file -> row of the file
    assert np.array_equal(i - 1, rows[j])

def test_overlaps_and_slivers_keep_the_rules(register):
    source = open_parcels(register[0]/'r.gpkg', name='who')
    near = source.window(square(500_000, 5_503_200, 320))
    assert shapely.is_valid(near.geometry.to_numpy()).all() and near.class_id[near.sliver].eq(legend.void).all()
    assert (near.who + 1 == near.parcel_id)[~near.sliver].all() and 8 not in set(near.who[~near.sliver])
    shapes = near.geometry.to_numpy()
    a, b = shapely.STRtree(shapes).query(shapes, predicate='intersects')
    assert shapely.area(shapely.intersection(shapes[a[a < b]], shapes[b[a < b]])).max() <= 1
    assert near.area[near.who == 7].iloc[0] > 0                              # the bow tie has its wings

def test_a_bow_tie_is_fetched_by_either_wing(register):
    for name in FORMATS[:3]:
        o = open_outlines(register[0]/name)
        for x in (500_005, 500_390): assert 7 in within(o, np.array([x, 5_500_140, x + 5, 5_500_150])).index, (name, x)

def test_deleted_rows_leave_no_gap_in_ids(register, tmp_path):
    import sqlite3
    here, table = register
    table.to_file(tmp_path/'d.gpkg')
    with sqlite3.connect(tmp_path/'d.gpkg') as db:
        for trigger, in db.execute("select name from sqlite_master where type='trigger'").fetchall(): db.execute(f'drop trigger "{trigger}"')
        db.execute('delete from d where fid in (2, 3, 4)')
    o = open_outlines(tmp_path/'d.gpkg')
    assert len(o) == 397 and within(o, None, ('who',)).who.tolist() == [0, *range(4, 400)]

def test_an_unknown_code_stops_before_anything_is_read(register):
    here, table = register
    with pytest.raises(ValueError, match=r'codebook bavaria does not know NC 999 \(1 parcels\); give a mapping csv'):
        table.assign(NC=[999, *table.NC[1:]]).to_file(here/'u.gpkg'); open_parcels(here/'u.gpkg')

# --- the Czech LPIS

def test_lpis_with_and_without_prj(tmp_path):
    west, north = -600_000, -1_150_000
    table = gpd.GeoDataFrame({'ID_DPB': [1, 2, 3], 'KULTURAKOD': ['R', 'T', 'C']}, crs=5514,
                             geometry=[box(west + 300*i, north, west + 300*i + 280, north + 400) for i in range(3)])
    table.to_file(tmp_path/'lpis.shp')
    with warnings.catch_warnings(): warnings.simplefilter('error'); named = open_parcels(tmp_path/'lpis.shp')
    (tmp_path/'lpis.prj').unlink()
    with pytest.warns(UserWarning, match='so EPSG:5514 was taken'): bare = open_parcels(tmp_path/'lpis.shp')
    assert bare.classes.tolist() == [14, 1, 11] and 'EPSG:5514' in bare.outlines.notes[0] and not named.outlines.notes
    x, y = table.to_crs(32633).total_bounds[[0, 3]] // 10 * 10
    grid = square(int(x), int(y) + 10, 128)
    for a, b in zip(burn(named.window(grid), grid, 0), burn(bare.window(grid), grid, 0)): assert np.array_equal(a, b) and b.any()
    table.rename(columns={'ID_DPB': 'a', 'KULTURAKOD': 'class_id'}).to_file(tmp_path/'other.shp'); (tmp_path/'other.prj').unlink()
    with pytest.raises(ValueError, match='names no projection'): open_parcels(tmp_path/'other.shp')

def test_contested_and_narrow_ground(tmp_path):
    "The smaller keeps the ground, a sliver takes none from a parcel, edges are void and never Background"
    shapes = [box(0, 0, 400, 400), box(100, 100, 200, 200), box(0, 300, 400, 306), box(400, 0, 640, 7)]
    shapes = [shapely.affinity.translate(s, 500_000, 5_500_000) for s in shapes]
    gpd.GeoDataFrame({'class_id': [1, 2, 6, 6]}, geometry=shapes, crs=32633).to_file(tmp_path/'c.gpkg')
    grid = square(500_000, 5_500_640, 64)
    labels, ids = burn(open_parcels(tmp_path/'c.gpkg').window(grid), grid, outside=0)
    assert {c: int((labels == c).sum()) for c in np.unique(labels)} == {0: 64*64 - 1600 - 24, 1: 1500, 2: 100, 14: 24}
    assert set(np.unique(ids)) == {0, 1, 2}
    source = open_parcels(tmp_path/'c.gpkg', buffer=10)
    inner, same = burn(source.window(grid), grid, outside=0)
    edge = (border_distance(source.window(grid), ids, grid) < 10) & (ids > 0)
    assert np.array_equal(same, ids) and (inner[edge] == 14).all() and np.array_equal(inner[~edge], labels[~edge])
    assert edge.sum() == (4*40 - 4) + (4*10 - 4) + (4*10 + 4)                # outer edge, edge of the plot, meadow around the plot
    wide = burn(open_parcels(tmp_path/'c.gpkg', width=0).window(grid), grid, outside=0)[1]
    assert set(np.unique(wide)) == {0, 1, 2, 3, 4}

def test_a_parcel_without_outline_keeps_its_row(tmp_path):
    shapes = [box(0, 0, 100, 100), None, Polygon(), box(200, 0, 300, 100)]
    table = gpd.GeoDataFrame({'class_id': [1, 2, 3, 4]}, geometry=shapes, crs=32633)
    table = table.set_geometry(shapely.transform(table.geometry.to_numpy(), lambda p: p + [500_000, 5_500_000]), crs=32633)
    for name in ('n.gpkg', 'n.shp', 'n.geojson', 'n.parquet'):
        table.to_parquet(tmp_path/name) if name == 'n.parquet' else (table.to_crs(4326) if 'json' in name else table).to_file(tmp_path/name)
        source, grid = open_parcels(tmp_path/name), square(500_000, 5_500_640, 64)
        assert len(source) == 4 and source.window(grid).parcel_id.tolist() == [1, 4], name

def test_each_tile_gets_its_own_labels_in_its_own_zone(tmp_path):
    "A8: the original read the polygons of the first tile only; A15: zone 33 was written in ten places"
    west, east = (gpd.GeoSeries([box(x, 5_500_000, x + 400, 5_500_400)], crs=crs).to_crs(4258).iloc[0]
                  for x, crs in ((690_000, 32633), (310_000, 32634)))
    gpd.GeoDataFrame({'PLODINA_ID': ['98', '261']}, geometry=[west, east], crs=4258).to_file(tmp_path/'t.gpkg')
    source = open_parcels(tmp_path/'t.gpkg')
    for i, (x, crs) in enumerate(((690_000, 'EPSG:32633'), (310_000, 'EPSG:32634'))):
        grid = square(x - 100, 5_500_500, 64, crs)
        labels, ids = burn(source.window(grid), grid, outside=0)
        assert ((ids == i + 1).sum(), labels.max()) == (1600, [4, 5][i]) and (ids > 0).sum() == 1600

def test_neighbours_of_one_crop_have_a_border():
    "D16: the original saw borders between classes only"
    two = gpd.GeoDataFrame({'parcel_id': [1, 2], 'class_id': [4, 4]}, crs=32633,
                           geometry=[box(500_000, 5_500_000, 500_320, 5_500_640), box(500_320, 5_500_000, 500_640, 5_500_640)])
    grid = square(500_000, 5_500_640, 64)
    labels, ids = burn(two, grid, 14)
    distance = border_distance(two, ids, grid)
    assert set(labels.ravel()) == {4} and np.allclose(distance[32, 30:34], [15, 5, 5, 15])

def test_workers_and_warnings(register, monkeypatch):
    import pickle
    from crop2seg import outlines
    source, grid = open_parcels(register[0]/'r.gpkg'), square(500_500, 5_502_500, 64)
    again = pickle.loads(pickle.dumps(source))                             # as it is sent to a Dask worker
    assert again.window(grid).parcel_id.tolist() == source.window(grid).parcel_id.tolist()
    monkeypatch.setattr(outlines, 'LARGE', 100)
    with pytest.warns(UserWarning, match='400 rows in one group'): open_parcels(register[0]/'r.parquet')
    with pytest.warns(UserWarning, match='convert it to GeoPackage'): open_parcels(register[0]/'r.geojson')

@needs_real
def test_temporary_grass_among_the_hundred():
    decisions = open_parcels(real/'czech_parcels'/'cz_declared_2024_100.gpkg').decisions.set_index('code')
    assert decisions.parcels['351'] == 28 and decisions.class_id['351'] == 7
    assert decisions.groupby('class_id').parcels.sum().to_dict() == {1: 5, 3: 9, 4: 16, 5: 12, 6: 7, 7: 43, 13: 6, 14: 2}

def test_pixels_by_another_way(register):
    "Each pixel centre looked up by itself: the smallest sound parcel that holds it, else void in a sliver, else outside"
    here, table = register
    grid = square(500_600, 5_502_600, 96)
    labels, ids = burn(open_parcels(here/'r.gpkg', codes='bavaria').window(grid), grid, outside=0)
    classes = read_mapping(mappings/'bavaria.csv', legend).class_id[table.NC.astype(str)].to_numpy()
    shapes = shapely.make_valid(table.geometry.to_numpy())
    thin = shapely.is_empty(shapely.buffer(shapes, -5))
    x, y = np.meshgrid(500_605 + 10*np.arange(96), 5_502_595 - 10*np.arange(96))
    point, row = shapely.STRtree(shapes).query(shapely.points(x.ravel(), y.ravel()), predicate='within')
    best = pd.DataFrame({'point': point, 'row': row, 'thin': thin[row], 'area': shapely.area(shapes)[row]})
    best = best.sort_values(['point', 'thin', 'area']).drop_duplicates('point')
    expected, number = np.zeros(96*96, 'uint8'), np.zeros(96*96, 'int32')
    expected[best.point] = np.where(best.thin, legend.void, classes[best.row])
    number[best.point] = np.where(best.thin, 0, best.row + 1)
    assert np.array_equal(ids.ravel(), number) and np.array_equal(labels.ravel(), expected) and (ids > 0).mean() > .5
