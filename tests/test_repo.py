"What must be true of the repository as files."
import ast, re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest

root = Path(__file__).parents[1]
modules = sorted(root.glob('crop2seg/**/*.py'))

@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def tracked():
    "Text files that git holds or would take."
    p = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=root, capture_output=True, text=True)
    if p.returncode: pytest.skip('not a git checkout, so which files belong to the project is unknown')
    text = {'.py', '.ini', '.md', '.yml', '.ipynb', '.csv', '.json', '.css', ''}
    return [f for f in map(root.joinpath, p.stdout.split('\0')) if f.suffix in text and f.is_file()]

def lines_with(pattern, files):
    "Where the pattern occurs, as file:line."
    return [f'{p.relative_to(root)}:{n}' for p in files
            for n, line in enumerate(p.read_text(encoding='utf-8').splitlines(), 1) if re.search(pattern, line)]

def test_one_quarto_file():
    link = root/'nbs'/'_quarto.yml'
    assert link.is_symlink() and link.resolve() == (root/'_quarto.yml').resolve()

@pytest.mark.parametrize('pin', ['nbdev==2.4.14', 'fastcore==1.14.5', 'execnb==0.1.18', 'fastai==2.8.7', 'torch==2.13.0',
                                 'panel==1.9.4', 'ipyleaflet==0.20.0', 'ipywidgets_bokeh==1.8.0'])
def test_pins(settings, pin):
    "Newer ones break: nbdev 3 refuses settings.ini, its helpers moved on, the map pane leans on one loader."
    assert pin in (settings['requirements'] + ' ' + settings['dev_requirements']).split()

def test_requirements_name_every_import(settings):
    "A package that only comes along with another one may stop coming."
    wanted = ' '.join(settings[f'{k}requirements'] for k in ('', 'clouds_', 'planetary_')) # the last two are optional
    named = {o.lower().replace('_', '-') for o in re.findall(r'[\w-]+', wanted)}
    owners = packages_distributions()
    missing = set()
    for p in modules:
        for node in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - {'crop2seg'}:
                if not {d.lower().replace('_', '-') for d in owners.get(name, [name])} & named: missing.add((p.name, name))
    assert not missing

def test_no_machine_paths():
    "Paths of the machine a page was written on mean nothing elsewhere."
    found = lines_with('/(?:work|root)' + '/', tracked())
    assert not found

def test_nothing_unpickles():
    "A model from a stranger must not be able to run code: safetensors and json only."
    unsafe = r'\b(import|from) (pickle|joblib)\b|\b(pickle|joblib)\.load|\bload_learner\b|\btorch\.load\b(?!\(.*weights_only=True\))|weights_only *= *False|allow_pickle *= *True'
    found = lines_with(unsafe, modules)
    assert not found

def test_readme_tells_how_to_test():
    assert 'make test' in (root/'README.md').read_text(encoding='utf-8')
