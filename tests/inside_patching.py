"""What the tests of patching take from the inside of the package, beside `inside.py`."""

from pyterrier_mech import PatchLayers, PatchPaths
from pyterrier_mech.frames import two_versions
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import engine_for
from pyterrier_mech.patch.variants import Variant, variants_of
from pyterrier_mech.units import HEADS, Site, parse


def whole_streams(model, frame):
    """Scores with the whole residual stream before each layer taken from the perturbed pair [layers, rows]."""
    stage, versions = PatchLayers(model), two_versions(frame, PatchLayers(model), 'text')
    inputs = Inputs.pairs(model, *versions, 'a')
    sites, vectors = model.map.sites('resid_pre'), []
    with model.computing():
        engine = engine_for(model)
        for tower in range(len(model.towers)):
            _, (base, source) = stage._both(engine, inputs, tower, inputs.good, sites)
            vectors.append(engine.vectors(base, source.values, [Variant(site) for site in sites], 10_000))
        return model.read(vectors).numpy(), inputs.good


def everything_told(model, frame, sender):
    """Scores where all later heads read what a sender of the last layer but one tells them, and the stream has it."""
    stage, versions = PatchPaths(model), two_versions(frame, PatchPaths(model), 'text')
    inputs, last = Inputs.pairs(model, *versions, 'a'), model.n_layers - 1
    unit, read, vectors = parse(sender), [Site(kind, last) for kind in 'qkv'], []
    with model.computing():
        engine = engine_for(model)
        for tower in range(len(model.towers)):
            sites = [Site(HEADS, 0), Site('attn_out', 0), *read]
            _, (base, source) = stage._both(engine, inputs, tower, inputs.good, sites)
            told = engine.frozen(base, source.values, variants_of([unit]), read, 10_000)
            values = {site: value[0] for _, site, value in told if site is not None}
            put = {site: (lambda _, value=value: value) for site, value in values.items()}
            reacting = model.map.run(base.batch, edits=put, record=[Site(HEADS, last)]).values
            mixed, columns = base.values[unit.site].clone(), model.map.layers[last].columns(unit.index)
            mixed[..., columns] = source.values[unit.site][..., columns]
            both = {unit.site: lambda _: mixed, Site(HEADS, last): lambda _: reacting[Site(HEADS, last)]}
            vectors.append(model.map.represent(base.batch, model.readout, edits=both)[0])
        return model.read(vectors).numpy(), inputs.good
