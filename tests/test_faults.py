"A server that fails by seed, a run that is killed, a worker that dies: the cube is the same, or the ledger says what is missing"
import hashlib, json, os, random, re, shutil, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, rasterio
from crop2seg.cube import load_cube, native_grid, open_cube, save_cube, scenes_of
from crop2seg.account import asset_ledger, settle
from crop2seg.fetch import fetch, fetched_cube, read_journal
from crop2seg.harmonise import ledger
from crop2seg.ranges import Patience
from crop2seg.reading import read_window
from crop2seg.season import Season
from crop2seg.remote import policy_of
from crop2seg.simulate import simulate
from crop2seg.stac import open_source, search

BANDS = ('B02', 'B04', 'B08', 'B11')
NEAR = policy_of(('127.0.0.1',), http=True, private=True) # the server of these tests
PASSING, LASTING = (429, 500, 503, 'stall', 'short', 'page', 'reset'), ('gone', 'size', 'login', 'down')

class Archive(BaseHTTPRequestHandler):
    "Ranges of a folder; `faults` maps a path to what happens to its next requests, the last of a list for ever if it lasts"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def handle(self):
        try: super().handle()
        except OSError: pass                                # the reader has left
    def do_GET(self):
        s, (path, _, token) = self.server, self.path.lstrip('/').partition('?')
        with s.lock:
            left = s.faults.get(path, [])
            fault = left[0] if left and left[0] in LASTING else left.pop(0) if left else None
            s.asked += 1
            good = token == f'sig={s.token}'
            s.served += good
            if good and s.expires and s.served % s.expires == 0: s.token += 1   # signatures run out again and again
        time.sleep(s.delay)
        if not good: return self.say(403, b'expired')
        if fault == 'stall': return time.sleep(s.stall)
        if fault == 'reset': return self.connection.close()
        if fault in ('page', 'login'): return self.say(200, b'<html>please log in</html>', {'Content-Type': 'text/html'})
        if fault in ('gone', 'down') or isinstance(fault, int): return self.say(dict(gone=404, down=503).get(fault, fault), b'no')
        data = (s.folder/(s.other if fault == 'size' else path)).read_bytes()
        first, last = (int(n) for n in self.headers['Range'].removeprefix('bytes=').split('-'))
        body = data[first:last + 1]
        self.say(206, body, {'Content-Range': f'bytes {first}-{first + len(body) - 1}/{len(data)}'}, short=fault == 'short')
    def say(self, status, body, more={}, short=False):
        self.send_response(status)
        for k, v in {'Content-Length': len(body), **more}.items(): self.send_header(k, str(v))
        self.end_headers()
        if short: body, self.close_connection = body[:len(body) // 2], True
        self.server.sent += len(body); self.wfile.write(body)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A season on disk, its second granule of one day, and a server over both"
    folder = tmp_path_factory.mktemp('archive')
    items = search(open_source(simulate(folder/'season', size=128, dates=6, parcels=12, cloudy=.3, baseline='mixed')))
    twin = items[2].clone(); twin.id += '_B'
    shutil.copytree(Path(items[2].get_self_href()).parent, folder/'season'/'twin')
    for a in twin.assets.values(): a.href = str(folder/'season'/'twin'/Path(a.href).name)
    items = sorted([*items, twin], key=lambda i: (i.datetime, i.id))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Archive)
    server.daemon_threads, server.block_on_close = True, False
    server.folder, server.lock, server.other = folder, threading.Lock(), 'other.tif'
    with rasterio.open(items[0].assets['scl'].get_absolute_href()) as f: small = f.read(1)[:9, :9].astype('uint16')
    with rasterio.open(folder/'other.tif', 'w', driver='GTiff', width=9, height=9, count=1, dtype='uint16', crs='EPSG:32633', transform=rasterio.Affine(10, 0, 0, 0, -10, 0)) as f: f.write(small, 1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    calm(server)
    far = [i.clone() for i in items]
    for i in far:
        for a in i.assets.values():
            at = Path(a.get_absolute_href()).relative_to(folder)
            a.href = f'http://127.0.0.1:{server.server_port}/{at}?sig=0'
    rows = ledger(items, Season(2019))
    yield items, far, rows, native_grid(items), server
    server.shutdown()

def calm(server, **more):
    for k, v in (dict(faults={}, expires=0, token=0, asked=0, served=0, sent=0, delay=0, stall=.6) | more).items(): setattr(server, k, v)

def patience(server, **more):
    resign = lambda href: re.sub(r'sig=\d+', f'sig={server.token}', href)
    return Patience(**dict(policy=NEAR, stall=.3, timeout=20, pause=.01, most=.05, retries=12, resign=resign) | more)

def hashes(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.fixture(scope='module')
def truth(world, tmp_path_factory):
    "The cube of a day without faults, in memory and as hashes of its files"
    items, far, rows, grid, server = world
    scenes, folder = scenes_of(far, rows, BANDS), tmp_path_factory.mktemp('truth')
    got = fetch(scenes, grid, (*BANDS, 'SCL'), folder/'scratch', block=64, patience=patience(server, stall=9))
    assert set(got.status) == {'kept'} and got.bytes.sum() == server.sent, got[['error', 'fault']].iloc[0].tolist()
    save_cube(fetched_cube(scenes, grid, BANDS, folder/'scratch', block=64), folder/'cube.zarr')
    return open_cube(folder/'cube.zarr').compute(), hashes(folder/'cube.zarr')

@pytest.mark.parametrize('seed', range(20))
def test_faults_by_seed(world, truth, tmp_path, seed):
    items, far, rows, grid, server = world
    rng, scenes = random.Random(seed), scenes_of(far, rows, BANDS)
    at = {(s.id, b): s.files[b][0].split('?')[0].split('/', 3)[3] for s in scenes for b in (*BANDS, 'SCL')}
    doomed = set(rng.sample(sorted(at), rng.choice((0, 1, 1, 2, 3))))
    def plan(key):
        faults = rng.choices(PASSING, k=rng.choice((0, 0, 1, 2, 3)))
        while faults.count('page') > 1: faults.remove('page')
        return faults + [rng.choice(LASTING)] * (key in doomed)
    calm(server, faults={path: plan(key) for key, path in at.items()}, expires=rng.choice((0, 20, 40)))
    start = time.monotonic()
    got = fetch(scenes, grid, (*BANDS, 'SCL'), tmp_path/'scratch', block=128, patience=patience(server))
    assert time.monotonic() - start < 25                    # no hang: the limit of one window and a margin
    after = settle(rows, got)
    book = asset_ledger(after, got, BANDS).set_index(['scene', 'asset'])
    assert set(book.index[book.status == 'failed']) == doomed and (book.error[book.status == 'failed'] != '').all()
    lost = {scene for scene, _ in doomed}
    assert set(after.scene[after.status == 'failed']) == lost
    assert 'sig=' not in (tmp_path/'scratch'/'journal.jsonl').read_text() + book.to_csv()
    cube, whole = fetched_cube(scenes_of(far, after, BANDS), grid, BANDS, tmp_path/'scratch', block=128).compute(), truth[0]
    left = [d for d, day in rows.groupby('day') if set(day.scene) - lost]
    assert list(cube.time.values) == [np.datetime64(d) for d in left]
    assert np.array_equal(cube.reflectance.values, whole.reflectance.sel(time=cube.time).values)   # the twin holds the same pixels
    assert np.array_equal(cube.scl.values, whole.scl.sel(time=cube.time).values)
    assert np.isfinite(cube.reflectance.values).all() and (cube.scl.values > 0).all()             # no blank pixels

def test_what_failed_is_asked_again(world, truth, tmp_path):
    items, far, rows, grid, server = world
    scenes = scenes_of(far, rows, BANDS)
    path = scenes[0].files['B04'][0].split('?')[0].split('/', 3)[3]
    calm(server, faults={path: ['gone']})
    ask = lambda: fetch(scenes, grid, (*BANDS, 'SCL'), tmp_path, block=128, patience=patience(server, stall=9))
    assert list(ask().status).count('failed') == 1
    calm(server)
    got = ask()
    assert set(got.status) == {'kept'} and server.asked <= 2 and got.attempts[(got.scene == scenes[0].id) & (got.asset == 'B04')].item() == 2
    assert np.array_equal(fetched_cube(scenes, grid, BANDS, tmp_path, block=128).reflectance.values, truth[0].reflectance.values)

def test_stalled_server_is_left(world):
    items, far, rows, grid, server = world
    scene = scenes_of(far, rows, BANDS)[0]
    calm(server, faults={scene.files['B04'][0].split('?')[0].split('/', 3)[3]: ['stall'] * 99}, stall=30)
    start = time.monotonic()
    with pytest.raises(ValueError, match='no byte came in time'):
        read_window(scene.files['B04'][0], grid, patience=Patience(policy=NEAR, stall=.2, timeout=1.5, pause=.01, most=.05, retries=99))
    assert time.monotonic() - start < 2.5

DIES = '''
import os, signal, xarray
write = xarray.Dataset.to_zarr
def die(*args, **kwargs): write(*args, **kwargs); os.kill(os.getpid(), signal.SIGKILL)
xarray.Dataset.to_zarr = die
''' # killed when the cube is written and has not its name yet
RUN = '''
import json, sys
from crop2seg.cube import save_cube, scenes_of
from crop2seg.ranges import Patience
from crop2seg.remote import policy_of
from crop2seg.account import settle
from crop2seg.fetch import fetch, fetched_cube
from crop2seg.harmonise import ledger
from crop2seg.cube import native_grid
from crop2seg.season import Season
from pathlib import Path
import pystac
here = Path(sys.argv[1])
items = [pystac.Item.from_dict(d) for d in json.loads((here/'items.json').read_text())]
rows, grid, bands = ledger(items, Season(2019)), native_grid(items), ('B02', 'B04', 'B08', 'B11')
scenes = scenes_of(items, rows, bands)
got = fetch(scenes, grid, (*bands, 'SCL'), here/'scratch', block=64, workers=2, patience=Patience(policy=policy_of(('127.0.0.1',), http=True, private=True)))
save_cube(fetched_cube(scenes_of(items, settle(rows, got), bands), grid, bands, here/'scratch', block=64), here/'cube.zarr')
'''

@pytest.mark.parametrize('point', ['first', 'third', 'late', 'torn', 'save'])
def test_killed_and_resumed(world, truth, tmp_path, point):
    items, far, rows, grid, server = world
    calm(server, delay=.01)
    (tmp_path/'items.json').write_text(json.dumps([i.to_dict(include_self_link=False) for i in far]))
    run = [sys.executable, '-c', DIES*(point == 'save') + RUN, str(tmp_path)]
    job = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    journal, wanted = tmp_path/'scratch'/'journal.jsonl', dict(first=1, third=46, late=120, torn=80, save=140)[point]
    started = lambda: journal.exists() and journal.read_bytes().count(b'\n') >= wanted
    end = time.monotonic() + 60
    while point != 'save' and not started():
        assert job.poll() is None and time.monotonic() < end, job.stderr.read()
        time.sleep(.001)
    if point != 'save': job.kill()
    job.communicate(timeout=60)
    assert job.returncode == -signal.SIGKILL
    assert not (tmp_path/'cube.zarr').exists()
    if point == 'torn': journal.write_bytes(journal.read_bytes()[:-25])
    had, server.asked = len(read_journal(tmp_path/'scratch')), 0
    scenes = scenes_of(far, rows, BANDS)
    fetch(scenes, grid, (*BANDS, 'SCL'), tmp_path/'scratch', block=64, patience=Patience(policy=NEAR))
    assert server.asked <= 2 * (140 - had)                 # only what was missing
    save_cube(fetched_cube(scenes, grid, BANDS, tmp_path/'scratch', block=64), tmp_path/'cube.zarr')
    assert hashes(tmp_path/'cube.zarr') == truth[1]

def test_a_cluster_that_loses_a_worker(world, truth, tmp_path):
    from dask.distributed import Client, LocalCluster
    items, far, rows, grid, server = world
    calm(server, delay=.03)
    scenes, scratch = scenes_of(far, rows, BANDS), tmp_path/'scratch'
    with LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, Client(cluster) as client:
        pid = next(iter(client.run(os.getpid).values()))
        def kill():
            while len(read_journal(scratch)) < 30: time.sleep(.01)
            os.kill(pid, signal.SIGKILL)
        killer = threading.Thread(target=kill); killer.start()
        got = fetch(scenes, grid, (*BANDS, 'SCL'), scratch, block=64, scheduler=client, patience=Patience(policy=NEAR))
        killer.join()
        assert set(got.status) == {'kept'} and len(got) == len(scenes) * 5
        save_cube(fetched_cube(scenes, grid, BANDS, scratch, block=64), tmp_path/'cube.zarr')   # on the cluster too
        assert pid not in client.run(os.getpid).values()
    assert hashes(tmp_path/'cube.zarr') == truth[1]
