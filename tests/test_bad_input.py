"Every wrong input is one sentence and exit 1 (2 for a mistyped command), and leaves nothing half-written"
import json, shutil
from pathlib import Path
import geopandas as gpd, pytest, rasterio
from crop2seg.cli import main
from crop2seg.cube import open_cube, save_cube
from crop2seg.simulate import simulate
from crop2seg.training import train

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A simulated season, its cube and patches, and a network of two epochs"
    out = tmp_path_factory.mktemp('bad')
    catalog = simulate(out/'season', dates=10, parcels=10, cloudy=.2)
    for words in (['cube', '--source', catalog, '--out', out/'cube.zarr'],
                  ['dataset', '--source', out/'cube.zarr', '--labels', out/'season'/'labels.tif', '--out', out/'patches', '--size', 32, '--block', 320, '--folds', 2]):
        assert main([str(w) for w in words]) == 0
    train(out/'patches', out/'run', model_args=dict(widths=(8, 8), decoder=(8,), n_head=2, d_model=8), epochs=1, log=None)
    spoil(out)
    return out

def spoil(out):
    "The damaged inputs of the table below"
    shutil.copytree(out/'season', out/'torn')
    (image := next((out/'torn').rglob('B08.tif'))).write_bytes(image.read_bytes()[:1500])
    (out/'torn.tif').write_bytes((out/'season'/'labels.tif').read_bytes()[:400])
    (out/'list.json').write_text('[]')
    (out/'page.json').write_text('<html>404</html>')
    gpd.read_file(out/'season'/'parcels.gpkg').set_crs(None, allow_override=True).to_parquet(out/'nocrs.parquet')
    with rasterio.open(out/'season'/'labels.tif') as f: values, profile = f.read(1), f.profile
    with rasterio.open(out/'zone31.tif', 'w', **profile | dict(crs='EPSG:32631')) as f: f.write(values, 1)
    cube = open_cube(out/'cube.zarr')
    save_cube(cube.isel(time=slice(0, 0)), out/'empty.zarr')
    save_cube(cube.isel(band=slice(0, 6)), out/'sixbands.zarr')
    save_cube(cube.assign(clear=cube.clear & False), out/'cloudy.zarr')
    for name, change in (('bands', lambda r: r.update(bands=r['bands'][::-1])), ('legend', lambda r: r['legend']['ids'].pop(0)), ('pickle', lambda r: None), ('stats', lambda r: r.update(stats={}))):
        shutil.copytree(out/'run', out/f'run_{name}')
        facts = json.loads((out/f'run_{name}'/'run.json').read_text()); change(facts)
        (out/f'run_{name}'/'run.json').write_text(json.dumps(facts))
    (out/'run_pickle'/'model.safetensors').write_bytes(b'\x80\x04\x95cos\nsystem\n')
    (out/'file').touch()

TABLE = [
    ('map --source {h}/none.json --model {h}/run', 'does not exist'),
    ('map --source {h}/page.json --model {h}/run', 'not a STAC catalog'),
    ('map --source {h}/season --model {h}/run --bbox 0,0,1,1', 'no scene of this place'),
    ('map --source {h}/cube.zarr --model {h}/run --bbox 0,0,1,1', 'outside cube'),
    ('map --source {h}/season --model {h}/run --season 2011', 'outside 2010-09-01 to 2011-10-31'),
    ('map --source {h}/cube.zarr --model {h}/run --season 2011', 'no date from'),
    ('map --source {h}/empty.zarr --model {h}/run', 'has no date'),
    ('map --source {h}/torn --model {h}/run', 'B08.tif cannot be read'),
    ('map --source {h}/season --model {h}/none', 'there is no model'),
    ('map --source {h}/season', 'no model was named'),
    ('map --source {h}/cube.zarr --model {h}/run_bands', 'trained on'),
    ('map --source {h}/sixbands.zarr --model {h}/run', 'trained on'),
    ('map --source {h}/cube.zarr --model {h}/run_legend', ''),
    ('map --source {h}/cube.zarr --model {h}/run_pickle', 'no safetensors file'),
    ('map --source {h}/season --model {h}/run --aoi {h}/nocrs.parquet', 'coordinate system'),
    ('map --source {h}/season --model {h}/run --aoi {h}/none.gpkg', 'no file at'),
    ('map --source {h}/season --model {h}/run --bbox 14,50', 'four numbers'),
    ('map --source {h}/season --model {h}/run --bbox a,b,c,d', 'four numbers'),
    ('map --source {h}/season --model {h}/run --start 2019-13-01 --end 2019-14-01', 'YYYY-MM-DD'),
    ('map --source {h}/season --model {h}/run --overlap 200', 'overlap of 200'),
    ('map --source {h}/season --model {h}/run --bbox -5,50,-4,51', 'no scene of this place'),
    ('map --source {h}/season --model {h}/run --aoi {h}/page.json', 'cannot be read as a place'),
    ('map --source {h}/list.json --model {h}/run', 'not a STAC catalog'),
    ('map --source {h}/cube.zarr --model {h}/run_stats', 'lacks the mean and std'),
    ('cube --source {h}/season', 'does not end in .zarr'),
    ('map --source {h}/season --model {h}/run --start 2018-03-01 --end 2018-12-31', 'more than one season'),
    ('dataset --source {h}/cube.zarr --labels {h}/torn.tif', 'cannot be read'),
    ('dataset --source {h}/cube.zarr --labels {h}/zone31.tif', 'EPSG:32631'),
    ('dataset --source {h}/cube.zarr --parcels {h}/nocrs.parquet', 'names no projection'),
    ('dataset --source {h}/cube.zarr --parcels {h}/season/parcels.gpkg --column crop', 'not classes of the legend'),
    ('dataset --source {h}/cube.zarr --parcels {h}/season/parcels.gpkg', 'fewer than 5 folds'),
    ('train --data {h}/season', 'holds no data set'),
    ('train --data {h}/patches --model wheatnet', 'wheatnet'),
    ('train --data {h}/patches --fold 9', 'fold 9'),
    ('train --data {h}/patches --model-args {{', 'JSON'),
    ('train --data {h}/patches --model-args 5', 'must be a JSON object'),
    ('train --data {h}/patches --model-args {{"widths":"abc"}}', 'do not make a timeunet'),
]

@pytest.mark.parametrize('words, says', TABLE, ids=[w for w, _ in TABLE])
def test_one_sentence(here, capfd, words, says):
    before = {p for p in here.rglob('*')}
    code = main([w.format(h=here) for w in words.split()] + ['--out', str(here/'bad')])
    said = [l for l in capfd.readouterr().err.splitlines() if l.startswith('crop2seg: ')]
    assert code == 1 and len(said) == 1 and says in said[0] and 'debug shows where' not in said[0]
    assert {p for p in here.rglob('*')} == before

def test_a_folder_that_cannot_be_written(here, capfd):
    assert main(['map', '--source', str(here/'season'), '--model', str(here/'run'), '--out', str(here/'file'/'map')]) == 1
    assert 'choose a folder that you may write to' in capfd.readouterr().err

@pytest.mark.parametrize('words', ['', 'paint', 'map', 'map --sauce x --out y', 'cube --out', 'cube --out x.zarr --min-clear 1.1', 'cube --out x.zarr --cloud-margin nan',
                                   'dataset --out x --folds 0', 'dataset --out x --block -160', 'train --data x --out y --lr -1', 'train --data x --out y --fold some'])
def test_a_mistyped_command(words, capsys):
    with pytest.raises(SystemExit) as e: main(words.split())
    assert e.value.code == 2

def test_what_is_there_stays(here, capfd):
    (here/'mine').mkdir(); (here/'mine'/'thesis.txt').write_text('years of work')
    assert main(['map', '--source', str(here/'season'), '--model', str(here/'run'), '--out', str(here/'mine')]) == 1
    assert 'no crop map' in capfd.readouterr().err and (here/'mine'/'thesis.txt').exists()

def test_overwrite_replaces_only_what_is_ours(here, capfd):
    for words in (['map', '--model', here/'run', '--out', here/'season'], ['cube', '--out', here/'season'], ['map', '--model', here/'run', '--out', here/'run']):
        assert main([str(w) for w in words + ['--source', here/'season'/'catalog.json', '--overwrite']]) == 1
    assert (here/'season'/'catalog.json').exists() and (here/'run'/'model.safetensors').exists()

def test_a_changed_source_is_noticed(here, capfd):
    words = lambda verb, *more: main([str(w) for w in (verb, *more)])
    assert words('cube', '--source', here/'season', '--out', here/'grow.zarr', '--start', '2019-04-01', '--end', '2019-06-30') == 0
    assert words('map', '--source', here/'grow.zarr', '--model', here/'run', '--out', here/'grow') == 0
    assert words('cube', '--source', here/'season', '--out', here/'grow.zarr', '--overwrite') == 0
    assert words('map', '--source', here/'grow.zarr', '--model', here/'run', '--out', here/'grow') == 1
    assert 'holds another crop map' in capfd.readouterr().err
    assert words('map', '--source', here/'grow.zarr', '--model', here/'run', '--out', here/'grow', '--overwrite') == 0
    assert len(json.loads((here/'grow'/'run.json').read_text())['dates']) == open_cube(here/'grow.zarr').sizes['time']

def test_a_bundle_is_not_made_from_itself(here, capfd):
    words = ['map', '--model', str(here/'run'), '--out', str(here/'own'), '--source']
    assert main(words + [str(here/'season')]) == 0
    assert main(words + [str(here/'own'/'cube.zarr'), '--overwrite']) == 1 and 'the source lies in' in capfd.readouterr().err
    assert (here/'own'/'cube.zarr').exists()

def test_another_recipe_is_no_resume(here, capfd):
    words = ['train', '--data', str(here/'patches'), '--model', 'timeunet-nano', '--fold', 'none', '--epochs', '1', '--out', str(here/'again')]
    assert main(words) == 0 and main(words) == 0
    assert main(words + ['--lr', '0.1']) == 1 and 'was begun with' in capfd.readouterr().err
