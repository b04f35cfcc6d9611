"The walk from a source to a cube: on a cluster as at home, and across any interruption"
import functools, hashlib, os, signal, subprocess, sys, threading, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pandas as pd, pystac, pytest, rasterio
from crop2seg.cli import main
from crop2seg.cube import open_cube
from crop2seg.even import make_regular
from crop2seg.fetch import read_journal
from crop2seg.observe import gather, make_cube
from crop2seg.remote import policy_of
from crop2seg.request import Request
from crop2seg.simulate import simulate
from crop2seg.stac import band_assets, open_source, search

COMMAND = [sys.executable, '-c', 'from crop2seg.cli import entry; entry()', 'cube']
DIES = '''
import os, signal, xarray
write = xarray.Dataset.to_zarr
def die(*args, **kwargs): write(*args, **kwargs); os.kill(os.getpid(), signal.SIGKILL)
xarray.Dataset.to_zarr = die
from crop2seg.cli import entry
entry()
''' # the command, killed when its cube is written and has not its name yet

def hashes(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A season of two baselines, its cube made at home"
    here = tmp_path_factory.mktemp('observe')
    source = simulate(here/'season', size=64, dates=12, parcels=12, cloudy=.3, baseline='mixed')
    return source, make_cube(source, here/'home.zarr', log=lambda *a: None)

def test_processes_bring_the_same(world, tmp_path):
    source, home = world
    assert hashes(make_cube(source, tmp_path/'cube.zarr', scheduler='processes', workers=2, log=lambda *a: None)) == hashes(home)

def test_a_cluster_brings_the_same_though_a_worker_dies(world, tmp_path):
    from dask.distributed import Client, LocalCluster
    source, home = world
    with LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with Client(cluster) as client: pid = next(iter(client.run(os.getpid).values()))
        def kill():
            while not (found := list(tmp_path.glob('.cube.*.pieces'))) or len(read_journal(found[0])) < 40: time.sleep(.01)
            os.kill(pid, signal.SIGKILL)
        killer = threading.Thread(target=kill, daemon=True); killer.start()
        made = make_cube(source, tmp_path/'cube.zarr', scheduler=cluster.scheduler_address, log=lambda *a: None)
        killer.join(5)
    assert not killer.is_alive() and hashes(made) == hashes(home)
    with pytest.raises(ValueError, match='no Dask cluster answers'):
        make_cube(source, tmp_path/'other.zarr', scheduler='tcp://127.0.0.1:1')

@pytest.mark.parametrize('point', [1, 30, 90, 'save'])
def test_a_killed_command_goes_on(world, tmp_path, point):
    source, home = world
    out = tmp_path/'cube.zarr'
    command = [sys.executable, '-c', DIES, 'cube'] if point == 'save' else COMMAND
    job = subprocess.Popen([*command, '--source', str(source), '--out', str(out), '--workers', '1'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = lambda: next(iter(tmp_path.glob('.cube.*.pieces')), None)
    there = lambda: point != 'save' and folder() and len(read_journal(folder())) >= point
    end = time.monotonic() + 120
    while not there() and job.poll() is None: assert time.monotonic() < end; time.sleep(.002)
    job.kill(); assert job.wait() == -signal.SIGKILL
    assert not out.exists()
    had = read_journal(folder())
    again = subprocess.run([*COMMAND, '--source', str(source), '--out', str(out)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert hashes(out) == hashes(home)
    files = pd.read_csv(tmp_path/'cube.assets.csv')
    assert len(had) >= (1 if point == 'save' else point) and files.attempts.max() == 1                 # nothing came twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cube.assets.csv', 'cube.ledger.csv', 'cube.zarr']

def test_two_at_once(world, tmp_path):
    source, home = world
    jobs = [subprocess.Popen([*COMMAND, '--source', str(source), '--out', str(tmp_path/'cube.zarr')], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [j.communicate()[1] for j in jobs]
    ends = sorted(j.returncode for j in jobs)
    assert ends == [0, 0] or (ends == [0, 1] and any('another run is making' in s for s in said)), said
    assert hashes(tmp_path/'cube.zarr') == hashes(home) and not list(tmp_path.glob('.*'))

def test_a_kill_between_ledgers_and_cube(world, tmp_path, monkeypatch):
    source, home = world
    out, quiet = tmp_path/'cube.zarr', lambda *a: None
    make_cube(source, out, least=.6, log=quiet)
    monkeypatch.setattr('crop2seg.observe.save_cube', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): make_cube(source, out, overwrite=True, log=quiet)
    monkeypatch.undo()
    with pytest.raises(ValueError, match='another request'): make_cube(source, out, log=quiet)
    make_cube(source, out, overwrite=True, log=quiet)
    assert hashes(out) == hashes(home) and (pd.read_csv(tmp_path/'cube.ledger.csv').status == 'kept').sum() == len(open_cube(out).time)
    (tmp_path/'cube.ledger.csv').unlink()                                                              # lost: made again without a question
    make_cube(source, out, log=quiet)
    assert hashes(out) == hashes(home) and (tmp_path/'cube.ledger.csv').exists()

def test_a_lost_scene_is_told_and_tried_again(tmp_path):
    source = simulate(tmp_path/'season', size=64, dates=8, parcels=12, cloudy=.2)
    image = sorted(source.parent.rglob('B08.tif') if source.suffix else source.rglob('B08.tif'))[3]
    pixels, said = image.read_bytes(), []
    image.unlink()
    make_cube(source, tmp_path/'cube.zarr', log=said.append)
    image.write_bytes(pixels)
    make_cube(source, tmp_path/'cube.zarr', log=said.append)
    assert '1 scenes failed' in said[0] and 'is there already; 1 scenes failed' in said[1]
    make_cube(source, tmp_path/'cube.zarr', overwrite=True, log=said.append)
    assert 'failed' not in said[2]

def test_a_share_is_that_of_what_is_left(tmp_path):
    "A day of two scenes that cover a half each: when one is lost, so is half of the day"
    source = simulate(tmp_path/'season', size=64, dates=4, parcels=12, cloudy=0., seed=3)
    items = search(open_source(source))
    for k, half in enumerate((slice(0, 32), slice(32, 64))):
        for key, asset in items[0].assets.items():
            path = Path(asset.get_absolute_href())
            if path.suffix != '.tif': continue
            with rasterio.open(path) as f: values, profile = f.read(1), f.profile
            part = slice(half.start*values.shape[1]//64, half.stop*values.shape[1]//64)
            kept = np.zeros_like(values); kept[:, part] = values[:, part]
            with rasterio.open(tmp_path/f'{k}.{path.name}', 'w', driver='GTiff', **{n: profile[n] for n in ('width', 'height', 'count', 'dtype', 'crs', 'transform')}, nodata=0) as f: f.write(kept, 1)
    twins = [items[0].clone() for _ in range(2)]
    for k, twin in enumerate(twins):
        twin.id += f'_{k}'
        for key, asset in items[0].assets.items():
            twin.assets[key].href = str(tmp_path/f'{k}.{Path(asset.get_absolute_href()).name}')
    catalog = pystac.Catalog('halves', 'a day of two halves')
    catalog.add_items([*twins, *items[1:]])
    catalog.normalize_and_save(str(tmp_path/'halves'), pystac.CatalogType.ABSOLUTE_PUBLISHED)
    whole, rows, _ = gather(Request(tmp_path/'halves'/'catalog.json', least=.6), tmp_path/'a', log=lambda *a: None)
    day = rows.day[rows.scene == twins[0].id].item()
    assert day in whole.time.values
    Path(twins[1].assets[band_assets(items[0])['B08']].href).unlink()
    left, rows, _ = gather(Request(tmp_path/'halves'/'catalog.json', least=.6), tmp_path/'b', log=lambda *a: None)
    assert day not in left.time.values
    assert rows.set_index('scene').status[[t.id for t in twins]].tolist() == ['dropped', 'failed']
    assert .4 < rows.set_index('scene').clear_share[twins[0].id] < .55

def test_pieces_of_another_cube_stay(world, tmp_path):
    source, _ = world
    other = tmp_path/f'.m.2019.{"0"*16}.pieces'; other.mkdir()
    make_cube(source, tmp_path/'m.zarr', log=lambda *a: None)
    assert other.exists() and not list(tmp_path.glob('.m.*.lock'))

def test_items_listed_twice_or_without_a_time(world, tmp_path):
    items = search(open_source(world[0]))
    twice = pystac.Catalog('odd', 'an item in two folders, one with a start and an end')
    twice.add_items([items[0].clone(), items[1].clone()]); part = pystac.Catalog('part', 'again'); part.add_item(items[0].clone()); twice.add_child(part)
    spanned = items[2].clone(); spanned.properties |= {k: items[2].datetime.strftime('%Y-%m-%dT%H:%M:%SZ') for k in ('start_datetime', 'end_datetime')}
    spanned.datetime = None; twice.add_item(spanned)
    for i in twice.get_items(recursive=True): i.make_asset_hrefs_absolute() if i.get_self_href() else None
    twice.normalize_and_save(str(tmp_path/'odd'), pystac.CatalogType.SELF_CONTAINED)
    found = search(open_source(tmp_path/'odd'/'catalog.json'))
    assert [i.id for i in found] == [i.id for i in items[:3]] and [i.datetime for i in found] == [i.datetime for i in items[:3]]

def test_the_policy_of_a_call_reaches_its_files(world, tmp_path):
    "A catalog behind an address, its images too; nothing in the environment allows them"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    source, home = world
    folder = source.parent if source.suffix else source
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f'http://127.0.0.1:{server.server_port}/catalog.json'
        with pytest.raises(ValueError, match='does not begin with https'): make_cube(where, tmp_path/'no.zarr', log=lambda *a: None)
        near = policy_of(('127.0.0.1',), http=True, private=True)
        made = make_cube(where, tmp_path/'cube.zarr', policy=near, log=lambda *a: None)
        server.shutdown()
    assert set(pd.read_csv(tmp_path/'cube.ledger.csv').status) <= {'kept', 'merged', 'dropped'} and not (tmp_path/'no.zarr').exists()
    assert open_cube(made).reflectance.equals(open_cube(home).reflectance)

def test_scenes_without_classes_need_a_detector(world, tmp_path, capsys):
    source, home = world
    items = [i.clone() for i in search(open_source(source))]
    for i in items:
        for a in i.assets.values(): a.href = a.get_absolute_href() or str((source.parent/i.id/a.href).resolve())
        if (i.datetime.year, i.datetime.month) > (2019, 3): i.assets.pop('scl')         # half of a season has lost its classes
    catalog = pystac.Catalog('blind', 'no classes'); catalog.add_items(items)
    catalog.normalize_and_save(str(tmp_path/'blind'), pystac.CatalogType.ABSOLUTE_PUBLISHED)
    where = ['cube', '--source', str(tmp_path/'blind'/'catalog.json'), '--out']
    assert main([*where, str(tmp_path/'some.zarr')]) == 0
    rows = pd.read_csv(tmp_path/'some.ledger.csv')
    assert rows.reason[rows.status == 'dropped'].str.contains('--detector').any() and (pd.to_datetime(rows.day[rows.status == 'kept']) < '2019-04').all()
    assert main([*where, str(tmp_path/'all.zarr'), '--detector', 'spectrum']) == 0
    cube, whole, files = open_cube(tmp_path/'all.zarr'), open_cube(home), pd.read_csv(tmp_path/'all.assets.csv')
    assert cube.sizes['time'] > open_cube(tmp_path/'some.zarr').sizes['time']
    same = cube.time[np.isin(cube.time, whole.time)]
    assert len(same) > 6 and cube.reflectance.sel(time=same).equals(whole.reflectance.sel(time=same))
    agree = (cube.clear == whole.clear).sel(time=same).mean(('y', 'x'))
    assert (agree[same < np.datetime64('2019-04')] == 1).all() and agree.mean() > .8
    none = files[(files.asset == 'SCL') & files.reason.fillna('').str.contains('the catalog has none')]
    assert set(none.status) == {'dropped'} and len(none) == (pd.to_datetime(rows.day) >= '2019-04').sum()

def test_an_even_clock_by_command_and_its_map(world, tmp_path, capsys):
    source, home = world
    days = pd.date_range('2018-09-01', '2019-10-31')
    pd.DataFrame(dict(date=days, tmean=10 - 12*np.cos((days.dayofyear - 15)/365*2*np.pi))).to_csv(tmp_path/'weather.csv')
    word = ['regular', '--source', str(home), '--out', str(tmp_path/'even.zarr')]
    assert main([*word, '--thermal', '200']) == 1 and 'both --thermal and --weather' in capsys.readouterr().err
    assert main([*word, '--thermal', '200', '--weather', str(tmp_path/'weather.csv'), '--gaps', 'nan', '--smooth', '600']) == 0
    even = open_cube(tmp_path/'even.zarr')
    assert even.clock == '200 degree days' and not even.clear.all() and even.clear.equals(even.reflectance.notnull().any('band'))
    assert main(['map', '--source', str(tmp_path/'even.zarr'), '--out', str(tmp_path/'map')]) == 0
    assert main(word) == 1 and 'exists' in capsys.readouterr().err

def test_a_cluster_keeps_the_same_even_clock(world, tmp_path):
    from dask.distributed import LocalCluster
    source, _ = world
    how = dict(how=dict(how='medoid', smooth=60.), clock=dict(every=15), log=lambda *a: None)
    here = make_regular(source, tmp_path/'here.zarr', **how)
    with LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        there = make_regular(source, tmp_path/'there.zarr', scheduler=cluster.scheduler_address, **how)
    assert hashes(here) == hashes(there)

def relaid(source, to, change):
    "A copy of a catalog, its items changed by `change(item)`; images are copied"
    items = [i.clone() for i in search(open_source(source))]
    for i in items:
        for a in i.assets.values(): a.href = a.get_absolute_href()
        change(i)
    catalog = pystac.Catalog(to.name, 'changed'); catalog.add_items(items)
    catalog.normalize_and_save(str(to), pystac.CatalogType.ABSOLUTE_PUBLISHED)
    return to/'catalog.json'

def repaint(asset, folder, paint, **profile):
    "Another image in place of an asset's"
    with rasterio.open(asset.href) as f: values, old = f.read(1), f.profile
    path = folder/f'{abs(hash(asset.href))}.tif'
    keep = {k: old[k] for k in ('width', 'height', 'crs', 'transform')}
    with rasterio.open(path, 'w', **dict(driver='GTiff', count=1, dtype=old['dtype'], nodata=old['nodata']) | keep | profile) as f: f.write(paint(values), 1)
    asset.href = str(path)

def test_odd_images_are_failures_and_never_numbers(world, tmp_path):
    source, home = world
    (images := tmp_path/'images').mkdir()
    kept = pd.read_csv(home.with_name('home.ledger.csv')).query('status == "kept"').scene.tolist()
    odd = {kept[0]: (lambda v: (v/1e4).astype('float32'), dict(dtype='float32', nodata=None), 'holds float32'),
           kept[1]: (lambda v: (v//256).astype('uint8'), dict(dtype='uint8'), 'holds uint8'),
           kept[2]: (lambda v: np.where(v > 0, v, 65535).astype('uint16'), dict(nodata=65535), '65535 is missing'),
           kept[3]: (lambda v: 0*v, {}, 'shows 0% of what its scene covers')}
    def change(item):
        if item.id in odd: repaint(item.assets[band_assets(item)['B04']], images, *odd[item.id][:1], **odd[item.id][1])
        if item.id == kept[4]: # the catalog lies about the place of one band
            at = item.assets[band_assets(item)['B08']].extra_fields['proj:transform']; at[2] += 100_000
    cube = open_cube(make_cube(relaid(source, tmp_path/'odd', change), tmp_path/'cube.zarr', log=lambda *a: None))
    rows = pd.read_csv(tmp_path/'cube.ledger.csv').set_index('scene')
    for scene, (_, _, says) in odd.items(): assert rows.status[scene] == 'failed' and says in rows.reason[scene], rows.loc[scene]
    assert rows.status[kept[4]] == 'failed' and rows.reason[kept[4]].startswith('B08: ')
    assert rows.status[kept[5:]].eq('kept').all() and cube.sizes['time'] == len(kept) - 5
    assert cube.reflectance.equals(open_cube(home).reflectance.sel(time=cube.time))

@pytest.mark.parametrize('said', ['no offset', 'contested', 'nothing'])
def test_bright_ground_is_never_made_dark(said, world, tmp_path):
    "Pale ground, nowhere below 0.09: without offset, and as pale as if it had one"
    source, _ = world
    (images := tmp_path/'images').mkdir()
    season = simulate(tmp_path/'season', size=32, dates=14, parcels=6, cloudy=.2)
    def change(item):
        if said == 'nothing': item.properties.pop('s2:processing_baseline')
        if said == 'contested': item.properties |= {'s2:processing_baseline': '05.09', 'earthsearch:boa_offset_applied': True}
        for band, key in band_assets(item).items():
            bands = item.assets[key].extra_fields['raster:bands']
            if band == 'SCL': continue
            if said == 'nothing': bands[0].pop('offset', None)
            if said == 'contested': bands[0]['offset'] = -.1
            repaint(item.assets[key], images, lambda v: np.where(v > 0, .35*v + 900, 0).astype('uint16'))
    told, lines = relaid(season, tmp_path/'pale', change), []
    if said != 'no offset':
        with pytest.raises(ValueError, match='ambiguous offset'): make_cube(told, tmp_path/'cube.zarr', log=lines.append)
        return
    cube = open_cube(make_cube(told, tmp_path/'cube.zarr', log=lines.append))
    assert (cube.offset == 0).all() and np.nanmin(cube.reflectance.sel(band='B02').where(cube.clear)) > .085
    assert 'bright ground, or a wrong catalog' in lines[0]
