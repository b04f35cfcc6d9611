"""Speed of the main steps, as ratios within one run on a simulated season: `make bench`.
Each pair is timed alternately, best of five; only the ratio means something on another machine."""
import tempfile, time, warnings
from pathlib import Path
import numpy as np, odc.stac, rasterio, torch
from crop2seg.clouds import add_clear
from crop2seg.cube import load_cube, native_grid, open_cube, save_cube
from crop2seg.dataset import CropDataset
from crop2seg.harmonise import ledger
from crop2seg.legend import read_legend
from crop2seg.mapping import predict_map
from crop2seg.models.zoo import build
from crop2seg.parcels import burn, read_parcels
from crop2seg.patches import read_patch, write_dataset
from crop2seg.season import Season
from crop2seg.simulate import simulate
from crop2seg.stac import band_assets, open_source, search

def race(title, ours, other, rounds=5):
    "Print how long `ours` takes in units of `other`."
    best = [float('inf')] * 2
    for _ in range(rounds):
        for i, f in enumerate((ours, other)):
            t = time.perf_counter(); f(); best[i] = min(best[i], time.perf_counter() - t)
    print(f'{title:<72}{best[0] / best[1]:6.2f}   ({best[0] * 1e3:.0f} ms against {best[1] * 1e3:.0f} ms)', flush=True)

def main():
    warnings.simplefilter('ignore'); torch.set_num_threads(1)
    legend = read_legend()
    with tempfile.TemporaryDirectory() as tmp:
        here = Path(tmp)
        items = search(open_source(simulate(here/'season', size=128, dates=20, parcels=60)))
        grid, rows = native_grid(items), ledger(items, Season(2019))
        keys = list(band_assets(items[0]).values())
        plain = lambda: odc.stac.load(items, bands=keys, geobox=grid, groupby='solar_day', chunks={}, resampling='cubic').compute()
        files = lambda: [rasterio.open(i.assets[k].get_absolute_href()).read(1) for i in items for k in keys]
        ours = lambda: load_cube(items, rows, grid).compute()
        race('cube: load_cube / odc.stac.load', ours, plain)
        race('cube: load_cube / reading every file whole, no resampling', ours, files)
        cube = open_cube(save_cube(add_clear(load_cube(items, rows, grid)), here/'cube.zarr'))
        labels, ids = burn(read_parcels(here/'season'/'parcels.gpkg', legend), grid, legend.void)
        folder = write_dataset(cube, labels, ids, here/'patches', legend, 2019, size=64, block=640, folds=2)
        name = CropDataset(folder).index.patch_id[0]
        window = cube.isel(y=slice(0, 64), x=slice(0, 64))
        race('patch of 64 px: numpy memory map / window of the Zarr cube', lambda: np.array(read_patch(folder, name)['series']), lambda: window.reflectance.compute())
        net = build('timeunet', n_classes=14).eval()
        x, days, pad = torch.randn(1, 30, 10, 64, 64), torch.arange(30)[None] * 12, torch.zeros(1, 30, dtype=torch.bool)
        half = pad.clone(); half[:, 15:] = True
        with torch.inference_mode(): race('Time-Unet, 30 dates: half of them padding / none', lambda: net(x, days, half), lambda: net(x, days, pad))
        run = dict(bands=cube.band.values.tolist(), legend=legend.to_dict(), model=dict(args=dict(n_classes=14)), stats=dict(mean=[.2] * 10, std=[.1] * 10))
        small = cube.isel(y=slice(0, 96), x=slice(0, 96)).load().assign_attrs(season_year=2019)
        sweep = lambda **kw: lambda: [None for _ in predict_map(small, net, run, **kw)]
        race('map of 96 px: windows of 64 px overlapping by 32 / one window', sweep(window=64, overlap=32), sweep(window=96), rounds=2)

if __name__ == '__main__': main()
