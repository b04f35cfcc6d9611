"The package as pip installs it from a wheel, away from the checkout."
import json, os, shutil, subprocess, sys, sysconfig, zipfile
from pathlib import Path
import pytest

root = Path(__file__).parents[1]

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy, so that no build folder is left in the checkout."
    tmp = tmp_path_factory.mktemp('wheel')
    skip = shutil.ignore_patterns('.*', 'build', 'dist', '_docs', '_proc', '*.egg-info', '__pycache__', 'runs', 'cache')
    shutil.copytree(root, tmp/'src', ignore=skip, symlinks=True)
    (tmp/'src'/'data'/'runs').mkdir()
    (tmp/'src'/'data'/'runs'/'mine.txt').write_text('stays at home')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', tmp, tmp/'src'], check=True)
    return next(tmp.glob('crop2seg-*.whl'))

@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    "A folder that holds the installed package and nothing else."
    site = tmp_path_factory.mktemp('site')
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', site, wheel], check=True)
    return site

@pytest.fixture(scope='module')
def away(site, tmp_path_factory):
    "Runs Python where the checkout can't be seen; -S keeps an editable install out, the paths name the rest."
    def run(*args):
        env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'CROP2SEG'))}
        env['PYTHONPATH'] = os.pathsep.join([str(site), sysconfig.get_path('purelib')])
        return subprocess.run([sys.executable, '-S', *args], cwd=tmp_path_factory.mktemp('away'), env=env, capture_output=True, text=True)
    return run

def test_wheel_carries_data(wheel):
    "All of data/ but what a run leaves there."
    names = zipfile.ZipFile(wheel).namelist()
    data = [p.relative_to(root) for p in (root/'data').rglob('*') if p.is_file()]
    data = [p.as_posix() for p in data if p.parts[1] not in ('cache', 'runs')]
    assert data and not [p for p in data if f'crop2seg/{p}' not in names]
    assert not [n for n in names if '/runs/' in n or not n.startswith('crop2seg')]
    assert wheel.stat().st_size < 25e6

def test_data_is_found(away, site):
    p = away('-c', "from crop2seg.legend import data_dir, read_legend; print(data_dir()); print(len(read_legend()))")
    assert p.returncode == 0, p.stderr
    where, classes = p.stdout.split()
    assert Path(where).resolve() == (site/'crop2seg'/'data').resolve() and int(classes) == 15

def test_sample_opens(away):
    p = away('-c', "from crop2seg.stac import open_source, search; items = search(open_source('sample')); print(len(items), items[0].properties['crop2seg:simulated'])")
    assert p.returncode == 0 and p.stdout.split() == ['36', 'True'], p.stderr

def test_every_module_imports_without_torchvision(away, site):
    "fastai asks pip for torchvision; crop2seg never loads it."
    names = ['.'.join(p.relative_to(site).with_suffix('').parts) for p in sorted((site/'crop2seg').rglob('*.py'))]
    code = f"import importlib, json, sys; [importlib.import_module(n) for n in {names}]; " \
           "print(json.dumps([sys.modules['crop2seg'].__file__, 'torchvision' in sys.modules]))"
    p = away('-c', code)
    assert p.returncode == 0, p.stderr
    file, torchvision = json.loads(p.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(site) and not torchvision

def test_command_helps(away, site):
    "The script that pip wrote, run by this Python."
    p = away(site/'bin'/'crop2seg', '--help')
    assert p.returncode == 0 and 'map' in p.stdout, p.stderr
