"The walk from a source to a cube: on a cluster as at home, and across any interruption"
import hashlib, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import pandas as pd, pytest
from crop2seg.fetch import read_journal
from crop2seg.observe import make_cube
from crop2seg.simulate import simulate

COMMAND = [sys.executable, '-c', 'from crop2seg.cli import entry; entry()', 'cube']

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
    job = subprocess.Popen([*COMMAND, '--source', str(source), '--out', str(out), '--workers', '1'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = lambda: next(iter(tmp_path.glob('.cube.*.pieces')), None)
    there = lambda: any(tmp_path.glob('.cube.zarr*/reflectance/c/*')) if point == 'save' else folder() and len(read_journal(folder())) >= point
    end = time.monotonic() + 120
    while not there() and job.poll() is None: assert time.monotonic() < end; time.sleep(.002)
    os.kill(job.pid, signal.SIGKILL); job.wait()
    assert not out.exists()
    had = read_journal(folder())
    again = subprocess.run([*COMMAND, '--source', str(source), '--out', str(out)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert hashes(out) == hashes(home)
    files = pd.read_csv(tmp_path/'cube.assets.csv')
    assert len(had) >= (1 if point == 'save' else point) and files.attempts.max() == 1                 # nothing came twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cube.assets.csv', 'cube.ledger.csv', 'cube.zarr']
