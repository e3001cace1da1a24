"""The house is read from the ground up: a room imports from itself and the rooms below, and tests from `inside`."""

import ast
from pathlib import Path

import pytest

import pyterrier_mech

LEVELS = [
    'stage units frames draws saving provenance columns tables',
    'anatomy',
    'inputs',
    'rankers',
    'evaluation perturb',
    'patch',
    'attribute',
    'results',
    'circuits features',
    'prune',
    'plot report',
    'durable',
    'lab',
    'cli',
    '__main__',
]
GROUND = LEVELS[0].split()
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}
PACKAGE, TESTS = Path(pyterrier_mech.__file__).parent, Path(__file__).parent
# Public names of what lives elsewhere.
ALIASES = {'stats.py', 'measures.py', '__init__.py'}
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob('*.py'))]
PUBLIC = {'attribute', 'cli', 'circuits', 'durable', 'evaluation', 'lab', 'measures', 'patch', 'perturb', 'plot'}
PUBLIC |= {'prune', 'rankers', 'results', 'stats', 'tables', 'units'}


def imports(path):
    """The parts behind the package's name of all that a file imports from it while it runs."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if 'TYPE_CHECKING' in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split('.')[1:] for name in names if name.split('.')[0] == 'pyterrier_mech')


def room_of(parts):
    return parts[0].removesuffix('.py')


@pytest.mark.parametrize(
    'file', [file for file in FILES if str(file) not in ALIASES and file.parts[0] != 'pt_docs'], ids=str
)
def test_arrows_point_down(file):
    room = room_of(file.parts)
    assert room in LEVEL, f'{file}: this room has no place in LEVELS'
    for parts in imports(PACKAGE / file):
        other = room_of(parts)
        below = other in LEVEL and LEVEL[other] < LEVEL[room]
        assert other == room or below or (other in GROUND and room in GROUND), f'{file} imports {".".join(parts)}'


@pytest.mark.parametrize('path', sorted(TESTS.rglob('*.py')), ids=lambda path: path.name)
def test_tests_reach_the_inside_in_one_place_and_not_each_other(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith('test_') for name in names), f'{path.name} imports another test module'
        deep = [name for name in names if name.startswith('pyterrier_mech.') and name.split('.', 1)[1] not in PUBLIC]
        assert not deep or path.stem.startswith('inside'), f'{path.name} imports {deep[0]}: do so in inside.py'
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 350, f'{path.name} is long: split it by topic'
