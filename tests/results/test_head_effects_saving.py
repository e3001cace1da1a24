"""Head effects as artifacts: saved, loaded, replaced, and never half there."""

import json
import math

import pandas as pd
import pyterrier as pt
import pytest
from toys import effect_frame

from pyterrier_mech import HeadEffects


class TestSaving:
    def test_roundtrip(self, simulated, tmp_path):
        frame = simulated.assign(patchable=['unchanged', *['yes'] * (len(simulated) - 1)])
        frame.loc[3, 'L2H0'] = math.nan
        with pytest.warns(UserWarning, match='1 patchable rows'):
            effects = HeadEffects.from_frame(frame, confidence=0.9)
        assert effects.path is pt.Artifact.NO_PATH
        # A folder name that Arrow would take for a partition.
        path = tmp_path / 'fold=1' / 'effects'
        assert effects.save(path) is effects
        assert effects.path == path
        loaded = HeadEffects.load(str(path))
        assert type(loaded) is HeadEffects and loaded.path == path
        assert loaded == effects and hash(loaded) == hash(effects) and repr(loaded) == repr(effects)
        pd.testing.assert_frame_equal(loaded.to_frame(), effects.to_frame(), check_exact=True)
        assert (loaded.n_unpatchable, loaded.n_nan, loaded.confidence) == ({'unchanged': 1}, 1, 0.9)
        assert loaded.mean_delta == effects.mean_delta
        assert sorted(p.name for p in path.parent.iterdir()) == ['effects']

    def test_roundtrip_of_nan(self, tmp_path):
        frame = effect_frame([('q1', 'd', 0.0, 1.0, 1.0), ('q2', 'd', 0.0, -1.0, 1.0)], ['L0H0'])
        with pytest.warns(UserWarning):
            effects = HeadEffects.from_frame(frame).save(tmp_path / 'e')
        loaded = HeadEffects.load(tmp_path / 'e')
        assert loaded == effects
        assert math.isnan(loaded.wrong_direction_share)
        json.loads((tmp_path / 'e' / 'pt_meta.json').read_text(), parse_constant=pytest.fail)

    def test_metadata(self, by_hand, tmp_path):
        HeadEffects.from_frame(by_hand).save(tmp_path / 'e')
        meta = json.loads((tmp_path / 'e' / 'pt_meta.json').read_text())
        assert (meta['type'], meta['format'], meta['package_hint']) == ('head_effects', 'mech', 'pyterrier-mech')
        assert pt.inspect.artifact_type_format(HeadEffects) == ('head_effects', 'mech')

    def test_load_by_entry_point(self, by_hand, tmp_path):
        if not any(ep.name == 'head_effects.mech' for ep in pt.utils.entry_points('pyterrier.artifact')):
            pytest.skip('entry point head_effects.mech is not registered: the package is not installed')
        effects = HeadEffects.from_frame(by_hand).save(tmp_path / 'e')
        loaded = pt.Artifact.load(str(tmp_path / 'e'))
        assert isinstance(loaded, HeadEffects) and loaded == effects

    def test_existing_path(self, by_hand, simulated, tmp_path):
        first, second = HeadEffects.from_frame(by_hand), HeadEffects.from_frame(simulated)
        first.save(tmp_path / 'e')
        with pytest.raises(FileExistsError, match='already exists; pass overwrite=True'):
            second.save(tmp_path / 'e')
        assert HeadEffects.load(tmp_path / 'e') == first
        second.save(tmp_path / 'e', overwrite=True)
        assert HeadEffects.load(tmp_path / 'e') == second
        assert [p.name for p in tmp_path.iterdir()] == ['e']

    def test_overwrite_spares_what_is_not_ours(self, by_hand, tmp_path):
        (tmp_path / 'thesis').mkdir()
        (tmp_path / 'thesis' / 'thesis.tex').write_text('three years')
        with pytest.raises(FileExistsError, match='holds no saved HeadEffects, so it stays'):
            HeadEffects.from_frame(by_hand).save(tmp_path / 'thesis', overwrite=True)
        assert (tmp_path / 'thesis' / 'thesis.tex').exists()

    @pytest.mark.parametrize('overwrite', [False, True])
    def test_a_failed_save_leaves_nothing_behind(self, by_hand, simulated, tmp_path, monkeypatch, overwrite):
        first = HeadEffects.from_frame(by_hand)
        if overwrite:
            first.save(tmp_path / 'e')

        def full_disk(*_, **__):
            raise OSError('no space left on device')

        second = HeadEffects.from_frame(simulated)
        with monkeypatch.context() as m, pytest.raises(OSError, match='no space'):
            m.setattr(type(tmp_path), 'write_text', full_disk)
            second.save(tmp_path / 'e', overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == (['e'] if overwrite else [])
        assert second.path is pt.Artifact.NO_PATH
        if overwrite:
            assert HeadEffects.load(tmp_path / 'e') == first

    def test_a_failed_rename_puts_the_old_folder_back(self, by_hand, simulated, tmp_path, monkeypatch):
        first = HeadEffects.from_frame(by_hand).save(tmp_path / 'e')
        rename = type(tmp_path).rename

        def fails_for_new(self, target):
            if self.name.endswith('.new'):
                raise OSError('rename failed')
            return rename(self, target)

        with monkeypatch.context() as m, pytest.raises(OSError, match='rename failed'):
            m.setattr(type(tmp_path), 'rename', fails_for_new)
            HeadEffects.from_frame(simulated).save(tmp_path / 'e', overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ['e']
        assert HeadEffects.load(tmp_path / 'e') == first

    def test_nothing_to_load(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='HeadEffects.from_frame'):
            HeadEffects.load(tmp_path / 'nowhere')
        with pytest.raises(ValueError, match='Use HeadEffects.from_frame'):
            HeadEffects(pt.Artifact.NO_PATH)

    def test_something_else_to_load(self, tmp_path):
        (tmp_path / 'pt_meta.json').write_text('{"type": "sparse_index", "format": "pisa"}')
        with pytest.raises(ValueError, match="type='sparse_index', format='pisa'"):
            HeadEffects.load(tmp_path)
