"Every wrong input is one sentence and exit 1 (2 for a mistyped command), and leaves nothing half-written"
import json, shutil
from pathlib import Path
import geopandas as gpd, pandas as pd, pytest, rasterio
from crop2seg.cli import main
from crop2seg.cube import open_cube, save_cube
from crop2seg.legend import data_dir
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
    for name, change in (('bands', lambda r: r.update(bands=r['bands'][::-1])), ('legend', lambda r: r['legend']['ids'].pop(0)), ('pickle', lambda r: None), ('stats', lambda r: r.update(stats={})), ('able', lambda r: r.update(drops_bands=True)),
                         ('names', lambda r: r['legend'].update(names=[f'crop {i}' for i in r['legend']['ids']]))):
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
    ('map --source {h}/season --model {h}/none', 'there is no model'),
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
    ('dataset --source {h}/cube.zarr --parcels {h}/season/parcels.gpkg --column crop', 'codebook legend does not know crop winter_wheat'),
    ('dataset --source {h}/cube.zarr --parcels {h}/season/parcels.gpkg', 'no patch has 30% of its pixels labelled'),
    ('dataset --source {h}/cube.zarr --parcels {h}/season/parcels.gpkg --size 16 --min-labelled .01', 'fewer than 5 folds'),
    ('dataset --source {h}/cube.zarr --labels {h}/season/labels.tif --codes hcat', '--codes belongs to --parcels'),
    ('dataset check {h}/season', 'dataset.json is missing'), ('dataset look {h}/season', 'write: crop2seg dataset check'),
    ('train --data {h}/season', 'holds no data set'),
    ('train --data {h}/patches --model wheatnet', 'wheatnet'),
    ('train --data {h}/patches --fold 9', 'fold 9'),
    ('train --data {h}/patches --model-args {{', 'JSON'),
    ('train --data {h}/patches --model-args 5', 'must be a JSON object'),
    ('train --data {h}/patches --model-args {{"widths":"abc"}}', 'timeunet cannot be built'),
    ('train --data {h}/patches --model tempcnn --model-args {{"withhold":[[0,10]]}}', 'band 10 cannot be withheld'),
    ('train --data {h}/patches --model tempcnn --model-args {{"withhold":[0,9]}}', 'give groups of band numbers'),
    ('train --data {h}/patches --model tempcnn --model-args {{"withhold":[["0"]]}}', 'give groups of band numbers'),
    ('train --data {h}/patches --model tempcnn --model-args {{"withhold":[[0,1,2,3,4,5,6,7,8,9]]}}', 'says nothing'),
    ('train --data {h}/patches --from {h}/none', 'there is no model'),
    ('train --data {h}/patches --from {h}/run_bands', 'use the same bands'),
    ('train --data {h}/patches --from {h}/run_names', 'set keep to 0'),
    ('train --data {h}/patches --from {h}/run_pickle', 'no safetensors file'),
    ('train --data {h}/patches --from {h}/run --model timeunet', 'drop --model'),
    ('train --data {h}/patches --from {h}/run --model-args {{"widths":[8]}}', 'drop --model'),
    ('train --data {h}/patches --recipe {{', 'JSON'),
    ('train --data {h}/patches --recipe {{"lr":1}}', 'takes no lr'),
    ('train --data {h}/patches --recipe {{"smoothing":0.1,"loss":"dice"}}', "choose 'cross_entropy'"),
    ('train --data {h}/patches --keep 1', 'need a model to start from'),
    ('train --data {h}/patches --tune head', 'need a model to start from'),
    ('dataset --simulated 2 --source {h}/season', 'drop --source'),
    ('dataset --simulated 2 --parcels {h}/season/parcels.gpkg', 'drop --parcels'),
    ('dataset --simulated 2 --fields 50', 'fields do not fill'),
]

@pytest.mark.parametrize('words, says', TABLE, ids=[w for w, _ in TABLE])
def test_one_sentence(here, capfd, words, says):
    before = {p for p in here.rglob('*')}
    code = main([w.format(h=here) for w in words.split()] + ['--out', str(here/'bad')])
    said = [l for l in capfd.readouterr().err.splitlines() if l.startswith('crop2seg: ')]
    assert code == 1 and len(said) == 1 and says in said[0] and 'debug shows where' not in said[0]
    assert {p for p in here.rglob('*')} == before

def test_a_torn_file_costs_its_scene_and_is_accounted_for(here, capfd):
    assert main(['map', '--source', str(here/'torn'), '--model', str(here/'run'), '--out', str(here/'patched')]) == 0
    assert '1 scenes failed' in capfd.readouterr().out
    book, files = (pd.read_csv(here/'patched'/f'{k}.csv') for k in ('ledger', 'assets'))
    lost, failed = book[book.status == 'failed'], files[files.status == 'failed']
    assert len(lost) == 1 and lost.reason.item().startswith('B08: ')
    assert failed.asset.tolist() == ['B08'] and failed.scene.tolist() == lost.scene.tolist() and 'cannot be read' in failed.error.item()
    days = open_cube(here/'patched'/'cube.zarr').time.dt.strftime('%Y-%m-%d').values
    assert lost.day.item() not in days and len(days) == (book.status == 'kept').sum()     # no blank image in its place

def test_a_folder_that_cannot_be_written(here, capfd):
    assert main(['map', '--source', str(here/'season'), '--model', str(here/'run'), '--out', str(here/'file'/'map')]) == 1
    assert 'choose a folder that you may write to' in capfd.readouterr().err

@pytest.mark.parametrize('words', ['', 'paint', 'map', 'map --sauce x --out y', 'cube --out', 'cube --out x.zarr --min-clear 1.1', 'cube --out x.zarr --cloud-margin nan',
                                   'dataset --out x --folds 0', 'dataset --out x --block -160', 'train --data x --out y --lr -1', 'train --data x --out y --fold some', 'train --data x --out y --from z --keep 101', 'train --data x --out y --from z --tune tail',
                                   'train --data x --out y --physics -1', 'dataset --out x --simulated 0', 'dataset --out x --simulated 2 --workers 0'])
def test_a_mistyped_command(words, capsys):
    with pytest.raises(SystemExit) as e: main(words.split())
    assert e.value.code == 2

def test_without_a_bundled_model(here, capfd, monkeypatch):
    shutil.copytree(data_dir()/'legends', here/'bare'/'legends')
    monkeypatch.setenv('CROP2SEG_DATA', str(here/'bare'))
    assert main(['map', '--source', str(here/'season'), '--out', str(here/'bad')]) == 1
    assert 'no model was named and none is bundled' in capfd.readouterr().err
    shutil.copytree(here/'run', here/'bare'/'models'/'default')
    assert main(['map', '--source', str(here/'cube.zarr'), '--out', str(here/'by_default')]) == 0

def test_a_source_without_some_bands(here, capfd):
    shutil.copytree(here/'season', here/'coarse')
    for f in (here/'coarse').rglob('*.json'):
        item = json.loads(f.read_text())
        item['assets'] = {k: a for k, a in item.get('assets', {}).items() if not any(b in a['href'] for b in ('B02', 'B03', 'B04', 'B08'))}
        if item.get('type') == 'Feature': f.write_text(json.dumps(item))
    words = lambda run: ['map', '--source', str(here/'coarse'/'catalog.json'), '--model', str(here/run), '--out', str(here/'coarse_map')]
    assert main(words('run')) == 1 and not (here/'coarse_map').exists()
    assert main(words('run_able')) == 0 and 'lacks B02, B03, B04, B08' in capfd.readouterr().out
    assert json.loads((here/'coarse_map'/'run.json').read_text())['bands'] == ['B05', 'B06', 'B07', 'B8A', 'B11', 'B12']
    assert main(words('run_able')) == 0 and 'is there already' in capfd.readouterr().out

def test_a_run_is_not_tuned_onto_itself(here, capfd):
    assert main(['train', '--data', str(here/'patches'), '--from', str(here/'run'), '--out', str(here/'run'), '--overwrite']) == 1
    assert 'is the run to start from' in capfd.readouterr().err and (here/'run'/'model.safetensors').exists()

def test_tuning_goes_on(here, capfd):
    words = ['train', '--data', str(here/'patches'), '--from', str(here/'run'), '--epochs', '1', '--out', str(here/'tuned')]
    assert main(words) == 0 and main(words) == 0
    assert main(words + ['--keep', '2']) == 1 and 'begun with keep 20.0, not 2.0' in capfd.readouterr().err

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
