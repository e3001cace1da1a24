"""Input of the estimator that is refused before any work."""

import numpy as np
import pytest
from toys import toy_cross_encoder, training_frame

from pyterrier_mech import PrunedReranker
from pyterrier_mech.prune import Distillation, FineTuning, Fisher, Magnitude, Movement, Patching, Plan, Rescaling

FRAME = training_frame()
QRELS = FRAME[['qid', 'docno']].assign(label=[(7 * i) % 3 for i in range(len(FRAME))])
OF_OTHERS = QRELS.assign(docno='x' + QRELS['docno'])
TRAIN = FRAME[FRAME['qid'] < 'q2']
SMALL = {'multiple': 8}


class Refusing:
    """A criterion that must not be asked."""

    needs = frozenset({'text'})

    def scores(self, model, data):
        raise AssertionError('there was work')


@pytest.mark.parametrize(
    'options, data, message',
    [
        ({'sparsity': 0.0}, {}, 'sparsity must be a share between 0 and 1; got sparsity=0.0'),
        ({'sparsity': 1.5}, {}, 'sparsity must be a share between 0 and 1; got sparsity=1.5'),
        ({'speedup': 2.0}, {}, "speedup=2.0 goes with budget='latency'"),
        ({'allocation': 'even'}, {}, 'allocation='),
        ({'protect': ['L5H0']}, {}, 'L5H0: .* does not have it'),
        ({'sparsity': 0.95, 'protect': ['L0H0', 'L0H1']}, {}, 'what must stay takes'),
        ({'model': 'mpnet'}, {}, 'cannot be removed'),
        ({'plan': ['L0H0']}, {}, 'takes the place of criterion'),
        ({'recovery': (FineTuning(),)}, {'qrels': None}, 'FineTuning needs judgements'),
        ({'criterion': Movement()}, {'qrels': None}, 'needs judgements'),
        ({'criterion': Patching()}, {}, 'Patching needs a second version of each text: put Perturb'),
        ({'recovery': Rescaling(ridge=0)}, {}, 'ridge must be above 0; got ridge=0'),
        ({'recovery': Distillation(epochs=0)}, {}, 'epochs must be 1 or more; got epochs=0'),
        ({'recovery': FineTuning(patience=0)}, {}, 'patience must be 1 or more; got patience=0'),
        ({}, {'qrels': QRELS.assign(qid='x' + QRELS['qid'])}, 'give the qrels of these topics'),
        (
            {'recovery': FineTuning()},
            {'qrels': QRELS.assign(docno='x' + QRELS['docno'])},
            'none of the 8 rows is judged',
        ),
        ({}, {'qrels': QRELS.drop(columns='label')}, "the frame of qrels has no 'label'"),
        ({}, {'validation': FRAME[FRAME['qid'] >= 'q1']}, "1 queries are in both .* 'q1'"),
        ({}, {'frame': TRAIN.drop(columns='text')}, "no 'text': put a first stage and a text loader before"),
        ({}, {'frame': TRAIN.head(0)}, 'has no rows'),
        ({}, {'frame': TRAIN.assign(text=None)}, 'have no string in column'),
        ({}, {'frame': TRAIN.assign(text_0=np.nan)}, "no string in column 'text_0'"),
    ],
)
def test_bad_input_before_any_work(options, data, message):
    options = {'model': 'bert', 'criterion': Refusing(), **options}
    model = toy_cross_encoder(options.pop('model'))
    if 'plan' in options:
        options['plan'] = Plan.removing(model, options['plan'])
    stage = PrunedReranker(model, options.pop('criterion'), **{**SMALL, **options})
    data = {'frame': TRAIN, 'qrels': QRELS, 'validation': None, **data}
    with pytest.raises(ValueError, match=message):
        stage.fit(data['frame'], data['qrels'], data['validation'], None)
    assert not stage.fitted
    with pytest.raises(AssertionError, match='there was work'):
        PrunedReranker(toy_cross_encoder('bert'), Refusing(), **SMALL).fit(TRAIN, QRELS)


def test_a_plan_for_another_model():
    plan = Plan.removing(toy_cross_encoder('bert', seed=1), ['L0H0'])
    with pytest.raises(ValueError, match='this plan is for a model of other weights'):
        PrunedReranker(toy_cross_encoder('bert'), plan=plan).fit(TRAIN)


def test_what_is_no_step_or_ranker():
    for options in ({'criterion': Fisher}, {'criterion': 0.5}, {'recovery': [Magnitude()]}):
        with pytest.raises(TypeError, match='must be an object with (scores|recover)'):
            PrunedReranker(toy_cross_encoder('bert'), **options).fit(TRAIN)
    with pytest.raises(TypeError, match='model must be a ranker'):
        PrunedReranker(toy_cross_encoder('bert').model)
