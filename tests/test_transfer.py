"Real land as the transfer scores see it; skipped where ../shared/real is not beside the checkout"
from pathlib import Path
import numpy as np, pytest, rasterio
from crop2seg.bands import BANDS
from crop2seg.cli import main
from crop2seg.few_shot import few_shot
from crop2seg.legend import read_legend
from crop2seg.observe import take
from crop2seg.places import read_bavaria, read_place
from crop2seg.season import Season
from crop2seg.simulated import sheet, write_simulated
from crop2seg.training import train
from crop2seg.transfer import as_sheet, cross_forest, deal_parcels, draw_parcels

real = Path(__file__).parents[2]/'shared'/'real'
pytestmark = pytest.mark.skipif(not real.is_dir(), reason=f'no real imagery at {real.parent.name}/{real.name}')

def test_a_place_is_the_cube_of_the_pipeline(tmp_path):
    cube, labels, ids = read_place(real/'flanders_2018', Season(2018))
    made = take(real/'flanders_2018', tmp_path/'cube.zarr', season=Season(2018)).compute()
    assert np.allclose(cube.reflectance, made.reflectance, atol=1e-6, equal_nan=True) and np.array_equal(cube.clear, made.clear)
    assert (labels != read_legend().void).sum() == 2247 and len(np.unique(ids)) == 20

def test_absent_bands_are_nan():
    cube, labels, _ = read_place(real/'flanders_2019_20m', Season(2019))
    assert cube.band.values.tolist() == list(BANDS) and cube.clear.any()
    absent = cube.reflectance.isnull().all(('time', 'y', 'x')).values
    assert [b for b, a in zip(BANDS, absent) if a] == ['B02', 'B03', 'B04', 'B08']

def test_a_map_without_the_bands_of_10_m(tmp_path):
    legend = read_legend()
    data = write_simulated(tmp_path/'sheets', seasons=1, fields=256, folds=1)
    words = lambda *more: main([str(w) for w in more])
    assert words('train', '--data', data, '--model', 'tempcnn', '--fold', 'none', '--epochs', 1, '--physics', 1, '--out', tmp_path/'run') == 0
    assert words('map', '--source', real/'flanders_2019_20m'/'catalog.json', '--season', 2019, '--model', tmp_path/'run', '--out', tmp_path/'map') == 0
    with rasterio.open(tmp_path/'map'/'crops.tif') as f: assert set(np.unique(f.read(1))) <= {*legend.classes, 255}

def test_few_parcels_teach_and_spare(tmp_path):
    place, sims = as_sheet(*read_bavaria(real/'bavaria_2018'/'fields_toa.csv')), [sheet(1, 64)]
    data = write_simulated(tmp_path/'sheets', seasons=1, fields=256, folds=1)
    run = train(data, tmp_path/'run', model='tempcnn', epochs=1, log=None)
    table = few_shot(place, run, 1, sims=sims, epochs=2).set_index('model')
    assert list(table.index) == ['before', 'tuned', 'forest'] and table.oa.between(0, 1).all()

def test_bavaria_as_fields():
    cube, labels, ids = read_bavaria(real/'bavaria_2018'/'fields_toa.csv')
    assert labels.shape == (1, 301) and (labels != read_legend().void).sum() == 290
    june = cube.sel(time='2018-06-15')
    green = june.reflectance.values[:, 0, june.clear.values[0] & (labels[0] == 6)]
    assert (np.median(green, 1) > 0).all() and np.median(green[0]) < .1
    few, rest = draw_parcels(labels, ids, 3, seed=1)
    assert not set(ids[few]) & set(ids[rest]) and few.sum() == 21
    sheet = as_sheet(cube, labels, ids)
    assert cross_forest(sheet, deal_parcels(sheet['labels'], sheet['ids'], 5), by='dates')['oa'] > .85
