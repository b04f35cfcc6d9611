"Everything CI checks, counted: python tools/test.py. Frame checks work on a copy of the tree, so open work is never touched."
import os, re, shutil, subprocess, sys, tempfile, time
import xml.etree.ElementTree as ET
from pathlib import Path
from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parents[1]
bin = Path(sys.executable).parent
env = {**os.environ, 'PATH': f'{bin}{os.pathsep}{os.environ["PATH"]}', 'PYTHONDONTWRITEBYTECODE': '1'}
count = dict(passed=0, failed=0)

def run(*cmd, cwd=root):
    "Exit status and all output of a command; in a copy of the tree Python reads the copy's modules."
    here = env if cwd == root else {**env, 'PYTHONPATH': str(cwd)}
    p = subprocess.run([str(o) for o in cmd], cwd=cwd, env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return p.returncode, p.stdout

def report(name, ok, why='', n=1):
    "Counts a check and says how it went."
    count['passed' if ok else 'failed'] += n
    print(f"{'ok    ' if ok else 'FAILED'} {name}", flush=True)
    if not ok: print('\n'.join('       ' + line for line in why.strip().split('\n')[-150:]), flush=True)

def copy_tree(to):
    "The files git would commit, as they are now; without git, all but hidden and built folders."
    status, names = run('git', 'ls-files', '-co', '--exclude-standard', '-z')
    if status:
        skip = shutil.ignore_patterns('.git', '.venv', '_*', 'build', 'dist', '*.egg-info', '__pycache__', 'cache', 'runs')
        shutil.copytree(root, to, symlinks=True, ignore=lambda d, fs: skip(d, fs) - {'__init__.py', '_modidx.py', '_quarto.yml'})
        return
    for name in filter(None, names.split('\0')):
        if not os.path.lexists(root/name): continue  # deleted, not yet committed
        (to/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/name, to/name, follow_symlinks=False)

def differences(copy, *patterns):
    "Names of files that differ between the tree and a copy that was made anew."
    found = {p.relative_to(base) for base in (root, copy) for g in patterns for p in base.glob(g)}
    bytes_of = lambda p: p.read_bytes() if p.exists() else None
    return [str(f) for f in sorted(found) if '.ipynb_checkpoints' not in f.parts and bytes_of(root/f) != bytes_of(copy/f)]

def remade(copy, name, remedy, cmd, *patterns):
    "Runs `cmd` in the copy and fails where the tree holds something else."
    status, out = run(*cmd, cwd=copy)
    differ = differences(copy, *patterns)
    why = out if status else f"{', '.join(differ)}: not what {cmd[-1]} makes; {remedy}"
    report(name, not status and not differ, why)

def frame(copy):
    "Modules, clean notebooks and README are what the notebooks make them."
    for f in (copy/'crop2seg').rglob('*.py'):
        if f.name != '__init__.py': f.unlink()  # so that a module without a notebook shows
    remade(copy, 'modules are the exported notebooks', 'run nbdev_export', [bin/'nbdev_export'], 'crop2seg/**/*.py')
    remade(copy, 'notebooks are clean', 'run nbdev_clean', [bin/'nbdev_clean'], 'nbs/**/*.ipynb')
    remade(copy, 'README is the index notebook', 'run python tools/readme.py', [sys.executable, 'tools/readme.py'], 'README.md')

def notebooks():
    "Every notebook, top to bottom; each one counts."
    total = len(nbglob(root/'nbs'))
    status, out = run(bin/'nbdev_test', '--n_workers', 2)
    failed = out.partition('On The Following Notebooks:')[2].count('.ipynb') or (total if status else 0)
    for name in re.findall(r'^\t(\S+\.ipynb)$', out, re.M): print(f'FAILED {name}')
    report(f'{total - failed} of {total} notebooks run', not status, out, 0)
    count['passed'] += total - failed
    count['failed'] += failed

def docs(copy):
    "The site builds, with a page for each notebook and no link into the void."
    site = copy/'_docs'
    status, out = run(sys.executable, 'tools/docs.py', site, cwd=copy)
    pages, total = len(list(site.rglob('*.html'))), len(nbglob(copy/'nbs'))
    ok = not status and 'broken link' not in out and pages >= total and (site/'search.json').exists()
    report('docs build', ok, f'{out}\n{pages} pages of {total} notebooks')

def pytests(tmp):
    "Installed package, repository and browser."
    _, out = run(sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'no:cacheprovider', f'--junitxml={tmp}/tests.xml', 'tests')
    cases = list(ET.parse(tmp/'tests.xml').iter('testcase')) if (tmp/'tests.xml').exists() else []
    has = lambda *kinds: sum(any(c.find(k) is not None for k in kinds) for c in cases)
    failed, skipped = has('failure', 'error') or int(not cases), has('skipped')
    count['passed'] += len(cases) - has('failure', 'error') - skipped
    report(f'{len(cases)} tests of tests/, {skipped} skipped', not failed, out, failed)
    for line in re.findall(r'^SKIPPED.*', out, re.M): print('      ', line)

def main():
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        copy_tree(tmp/'tree')
        frame(tmp/'tree')
        docs(tmp/'tree')
        notebooks()
        pytests(tmp)
    print(f'{time.time() - start:.0f} s\n{count["passed"]} passed, {count["failed"]} failed')
    sys.exit(count['failed'] > 0)

if __name__ == '__main__': main()
