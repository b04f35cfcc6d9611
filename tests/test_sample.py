"The bundled season: it opens, is complete, fits together, and nothing in it points elsewhere"
import hashlib
from pathlib import Path
import geopandas as gpd, numpy as np, pandas as pd, pytest, rasterio
from rasterio.features import geometry_mask
from crop2seg.bands import BANDS
from crop2seg.cli import main
from crop2seg.legend import read_legend
from crop2seg.observe import make_cube
from crop2seg.stac import open_source, search

sample = Path(__file__).parents[1]/'data'/'sample'
FINGERPRINT = '250564a68a87e734' # Of all rasters and tables; changes with the sample only

@pytest.fixture(scope='module')
def items(): return search(open_source('sample'))

def values(path):
    with rasterio.open(path) as f: return f.read(1), f.crs.to_epsg(), f.transform

def test_small_and_whole():
    files = [p for p in sorted(sample.rglob('*')) if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    sha = hashlib.sha256()
    for p in files:
        if p.suffix in ('.tif', '.gpkg', '.csv'): sha.update(p.relative_to(sample).as_posix().encode() + p.read_bytes())
    assert sha.hexdigest()[:16] == FINGERPRINT

def test_nothing_points_elsewhere():
    assert not [p for p in sample.rglob('*') if p.is_symlink()]
    for p in sample.rglob('*.json'):
        links = [word for word in p.read_text().split('"') if word.endswith(('.json', '.tif')) and not word.startswith('https://stac-extensions')]
        assert links and not [w for w in links if not w.startswith(('./', '../'))]
        assert all((p.parent/w).resolve().is_relative_to(sample.resolve()) and (p.parent/w).exists() for w in links)

def test_scenes(items):
    assert len(items) == len({i.datetime for i in items}) == 36
    assert {i.properties['crop2seg:simulated'] for i in items} == {True}
    names = [*BANDS, 'SCL', 'truth']
    for i in items:
        folder = Path(i.get_self_href()).parent
        assert sorted(p.stem for p in folder.glob('*.tif')) == sorted(names) and len(i.assets) == 12
        for n in names:
            array, epsg, transform = values(folder/f'{n}.tif')
            assert epsg == 32633 and array.shape in ((176, 176), (88, 88)) and (transform.c, transform.f) == (444_600, 5_582_700)
            if n != 'truth': assert array.min() > 0

def test_labels_are_the_parcels():
    labels, epsg, transform = values(sample/'labels.tif')
    parcels = gpd.read_file(sample/'parcels.gpkg')
    assert parcels.crs.to_epsg() == epsg and parcels.is_valid.all() and parcels.parcel_id.is_unique
    assert set(parcels.class_id) == set(np.unique(labels)) - {0} == set(range(1, 14)) < set(read_legend().ids)
    for c, part in parcels.groupby('class_id'):
        burnt = geometry_mask(part.geometry, labels.shape, transform, invert=True)
        assert (burnt != (labels == c)).mean() < .002
    within = geometry_mask(parcels.geometry, labels.shape, transform, invert=True)
    assert ((labels > 0) != within).mean() < .002

def test_weather_covers_the_season(items):
    days = pd.to_datetime(pd.read_csv(sample/'weather.csv').date)
    assert days.is_monotonic_increasing and days.min().date() < items[0].datetime.date() and days.max().date() > items[-1].datetime.date()

def test_clear_enough_to_map(items, tmp_path):
    said = []
    make_cube('sample', tmp_path/'sample.zarr', log=said.append)
    book = pd.read_csv(tmp_path/'sample.ledger.csv')
    assert (book.status == 'kept').sum() >= 27 and book.clear_share[book.status == 'kept'].median() > .5

@pytest.mark.skipif(not (sample.parent/'models'/'default'/'run.json').exists(), reason='there is no bundled model')
def test_bundled_model_maps_it(tmp_path):
    assert main(['map', '--out', str(tmp_path/'map')]) == 0
    crops, truth = (values(p)[0] for p in (tmp_path/'map'/'crops.tif', sample/'labels.tif'))
    assert (crops == truth)[truth > 0].mean() > .6
    fields = gpd.read_file(tmp_path/'map'/'parcels.gpkg')
    assert len(fields) == len(gpd.read_file(sample/'parcels.gpkg')) and (fields.pixels > 0).all()
    assert (fields.mapped_class == fields.class_id).mean() > .6 and fields['share'].between(0, 1).all()

def test_parcels_of_another_place_are_refused(tmp_path, capsys):
    table = gpd.read_file(sample/'parcels.gpkg')
    table.set_geometry(table.translate(90_000)).to_file(tmp_path/'far.gpkg')
    assert main(['map', '--parcels', str(tmp_path/'far.gpkg'), '--out', str(tmp_path/'map')]) == 1
    assert 'no parcel covers a pixel' in capsys.readouterr().err and not (tmp_path/'map').exists()
    assert main(['map', '--parcels', str(tmp_path/'none.gpkg'), '--out', str(tmp_path/'map')]) == 1
    assert 'give a file of parcels' in capsys.readouterr().err

def test_a_place_that_was_not_named_is_asked_for(tmp_path, capsys):
    assert main(['map', '--out', str(tmp_path/'map'), '--bbox']) == 1
    assert 'give W,S,E,N in degrees' in capsys.readouterr().err and not (tmp_path/'map').exists()
