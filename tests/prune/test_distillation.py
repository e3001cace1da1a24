"""Recoveries that train: their losses by hand, their steps by a plain loop, and what they must leave alone."""

import copy
import functools

import ir_measures
import numpy as np
import pandas as pd
import pytest
import torch
from fits import DOCS, FAST, close_weights, data, mixed, pruned, same_history, trained
from inside import FitData, Schedule, batches, margin_error, with_negatives
from toys import QUERIES, same_weights, toy_bi_encoder, toy_cross_encoder, weights

from pyterrier_mech.prune import Distillation, FineTuning

pytestmark = pytest.mark.numeric

# -- the margin error and the negatives


def test_margin_error_by_hand():
    errors = torch.tensor([1.0, 4.0, 2.0, 0.0, 5.0])
    # Pairs of group 0: 3² 1² 2², of group 1: 5²; mean over all.
    assert float(margin_error(errors, np.array([0, 0, 0, 1, 1]))) == pytest.approx((9 + 1 + 4 + 25) / 4)


def test_margin_error_by_a_double_loop():
    rng = np.random.default_rng(0)
    errors, group = rng.normal(size=12), rng.integers(0, 3, 12)
    found = margin_error(torch.from_numpy(errors), group)
    pairs = [(errors[i] - errors[j]) ** 2 for i in range(12) for j in range(12) if i != j and group[i] == group[j]]
    assert float(found) == pytest.approx(np.mean(pairs), rel=1e-12)


def negatives(fit, share=0.5, seed=0):
    found = with_negatives(fit, share, seed).frame
    return set(found[['qid', 'query', 'docno', 'text']].itertuples(index=False, name=None)), len(found)


def some_of_each():
    """Four queries with texts of their own, two of them shared, one under two names."""
    rows = [(i, j) for i in range(4) for j in range(6) if (i + j) % 3]
    frame = pd.DataFrame([(f'q{i}', QUERIES[i], f'd{j}', DOCS[j]) for i, j in rows])
    frame.columns = ['qid', 'query', 'docno', 'text']
    again = pd.DataFrame([('q9', 'a query', 'copy', DOCS[1]), ('q9', 'a query', 'other', 'Another text.')])
    again.columns = frame.columns
    return FitData(pd.concat([frame, again], ignore_index=True))


def test_negatives_are_texts_of_other_queries():
    fit = some_of_each()
    own = set(fit.frame.itertuples(index=False, name=None))
    found, count = negatives(fit)
    assert own <= found and count == len(found) == len(own) + 4 * 2 + 1
    added = pd.DataFrame(sorted(found - own), columns=fit.frame.columns)
    for qid, rows in fit.frame.groupby('qid'):
        new = added[added['qid'] == qid]
        assert not set(new['docno']) & set(rows['docno']) and not set(new['text']) & set(rows['text'])
        assert set(new['query']) == set(rows['query'])
    texts = dict(fit.frame[['docno', 'text']].itertuples(index=False, name=None))
    assert all(texts[docno] == text for docno, text in zip(added['docno'], added['text']))


def test_negatives_are_drawn_by_seed_not_by_order():
    fit = some_of_each()
    assert negatives(fit) == negatives(mixed(fit))
    assert len({frozenset(negatives(fit, seed=seed)[0]) for seed in range(5)}) > 1
    assert negatives(fit, 100.0)[1] <= 5 * 8 and with_negatives(fit, 0, 0) is fit


# -- one training by a plain loop


def plain_loop(recovery, loss, fit):
    """The same training by hand: AdamW on a copy, rising and falling rates, clipped gradients."""
    module = pruned(toy_cross_encoder('bert')).model.eval()
    parameters = [p for name, p in module.named_parameters() if 'embeddings' not in name]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    schedule = Schedule(**{name: getattr(recovery, name) for name in Schedule.__dataclass_fields__})
    made = list(batches(fit, schedule))
    for i, (rows, group) in enumerate(made):
        optimizer.param_groups[0]['lr'] = recovery.learning_rate * min(1, (len(made) - i) / (len(made) - 1))
        module.zero_grad()
        loss(module, fit.frame.iloc[rows], group).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        for p in parameters:
            p.grad *= min(1, 1 / (norm + 1e-6))
        optimizer.step()
    return module.state_dict()


def run_plain(module, rows):
    inputs = tokenizer()(rows['query'].tolist(), rows['text'].tolist(), padding=True, return_tensors='pt')
    out = module(**inputs, output_hidden_states=True)
    return out.logits[:, 0], out.hidden_states[1:], inputs['attention_mask'].bool()


@functools.cache
def tokenizer():
    return toy_cross_encoder('bert').tokenizer


@pytest.mark.parametrize('hidden', [0.0, 0.7])
def test_distillation_takes_the_steps_of_a_plain_loop(hidden):
    recovery = Distillation(**FAST, hidden=hidden, negatives=0.0)
    # Asked for hidden states, Hugging Face leaves hooks of its own.
    teacher = toy_cross_encoder('bert', fresh=True).model

    def loss(module, rows, group):
        scores, ours, mask = run_plain(module, rows)
        with torch.no_grad():
            targets, theirs, _ = run_plain(teacher, rows)
        errors = scores - targets
        pairs = [(errors[i] - errors[j]) ** 2 for i in range(8) for j in range(i) if group[i] == group[j]]
        first = torch.zeros_like(mask)
        first[:, 0] = True
        parts = [((a - b)[m] ** 2).sum() / (b[m] ** 2).sum() for a, b, m in zip(ours, theirs, (mask, first))]
        return torch.stack(pairs).mean() + hidden * (parts[0] + parts[1]) / 2

    expected = plain_loop(recovery, loss, data())
    for name, tensor in trained(recovery)[0].items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)


def test_fine_tuning_takes_the_steps_of_a_plain_loop():
    labels = [(f'q{i}', f'd{j}', (i * j) % 3) for i in range(4) for j in range(4) if (i, j) not in ((1, 2), (3, 0))]
    recovery, fit = FineTuning(**FAST), data(labels=labels)
    known = {(qid, docno): label for qid, docno, label in labels}
    keys = list(zip(fit.frame['qid'], fit.frame['docno']))
    judged = FitData(fit.frame[[key in known for key in keys]].reset_index(drop=True))

    def loss(module, rows, group):
        scores = run_plain(module, rows)[0]
        gains = [known[key] for key in zip(rows['qid'], rows['docno'])]
        n = range(len(rows))
        pairs = [(i, j) for i in n for j in n if group[i] == group[j] and gains[i] > gains[j]]
        if not pairs:
            return scores.sum() * 0
        return torch.stack([torch.log(1 + torch.exp(scores[j] - scores[i])) for i, j in pairs]).mean()

    expected = plain_loop(recovery, loss, judged)
    for name, tensor in trained(recovery, fit)[0].items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)


# -- what training does


def margins(model, teacher, fit):
    errors = torch.from_numpy(model.score(fit.queries, fit.texts) - teacher.score(fit.queries, fit.texts))
    return float(margin_error(errors, pd.factorize(fit.frame['qid'])[0]))


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder, functools.partial(toy_bi_encoder, pooling='cls')])
def test_the_student_comes_nearer_to_its_teacher(make):
    teacher = make('bert')
    student, fit = pruned(teacher), data()
    before = margins(student, teacher, fit)
    history = Distillation(**{**FAST, 'epochs': 8}, validations=2).recover(student, teacher, fit)
    assert history.columns.tolist() == ['step', 'loss', 'validation'] and history['validation'].isna().all()
    assert history['loss'].iloc[-1] < 0.5 * history['loss'].iloc[0]
    assert margins(student, teacher, fit) < 0.5 * before


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_fine_tuning_learns_the_judgements(make):
    teacher = make('bert')
    student, fit = pruned(teacher), data()

    def won():
        scores, labels = student.score(fit.queries, fit.texts), fit.labels().to_numpy()
        pairs = [(i, j) for q in range(4) for i in range(4 * q, 4 * q + 4) for j in range(4 * q, 4 * q + 4)]
        return np.mean([scores[i] > scores[j] for i, j in pairs if labels[i] > labels[j]])

    before = won()
    FineTuning(**{**FAST, 'epochs': 30, 'learning_rate': 1e-2}).recover(student, teacher, fit)
    assert won() > before + 0.2 and won() > 0.85


def test_validation_is_the_margin_error_mean_over_queries():
    teacher, validation = toy_cross_encoder('bert'), data([2, 3], [3, 4, 5])
    student = pruned(teacher)
    history = Distillation(**FAST).recover(student, teacher, data([0, 1]), validation)
    parts = [FitData(validation.frame[validation.frame['qid'] == q].reset_index(drop=True)) for q in ('q2', 'q3')]
    expected = np.mean([margins(student, teacher, part) for part in parts])
    assert history['validation'].min() == pytest.approx(expected, rel=1e-9)


def test_fine_tuning_stops_by_ndcg():
    teacher, validation = toy_cross_encoder('bert'), data([2, 3], range(6))
    student = pruned(teacher)
    history = FineTuning(**{**FAST, 'epochs': 4}).recover(student, teacher, data([0, 1]), validation)
    run = validation.frame.rename(columns={'qid': 'query_id', 'docno': 'doc_id'})
    run = run.assign(score=student.score(validation.queries, validation.texts))
    qrels = validation.qrels.set_axis(['query_id', 'doc_id', 'relevance'], axis=1)
    found = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
    assert 1 - history['validation'].min() == pytest.approx(found)


RECOVERIES = [Distillation(**FAST), FineTuning(**FAST)]
each = pytest.mark.parametrize('recovery', RECOVERIES, ids=['distillation', 'fine-tuning'])


@each
def test_what_is_left_as_it_was(recovery):
    teacher = toy_cross_encoder('bert', fresh=True)
    student = pruned(teacher)
    teacher.model.train()
    student.model.bert.train()
    student.model.classifier.weight.requires_grad_(False)
    student.model.classifier.bias.grad = torch.ones(1, dtype=torch.float64)
    before, whole, state = weights(student), weights(teacher), torch.get_rng_state()
    recovery.recover(student, teacher, data())
    after = weights(student)
    assert torch.equal(torch.get_rng_state(), state) and same_weights(weights(teacher), whole)
    assert all(p.requires_grad and p.grad is None for p in teacher.model.parameters())
    assert teacher.model.training and student.model.bert.training and not student.model.training
    assert [n for n, p in student.model.named_parameters() if not p.requires_grad] == ['classifier.weight']
    assert [n for n, p in student.model.named_parameters() if p.grad is not None] == ['classifier.bias']
    stayed = {name for name in after if torch.equal(after[name], before[name])}
    # No softmax feels the bias of the keys, at most its rounding does.
    assert {name for name in after if 'embeddings' in name} == {name for name in stayed if 'key.bias' not in name}
    # Neither dropout nor what required gradients had a say.
    assert close_weights(after, trained(recovery)[0])


@each
def test_seeds_and_order(recovery):
    expected, history = trained(recovery)
    again = trained(recovery)
    assert close_weights(again[0], expected) and same_history(again[1], history)
    assert close_weights(trained(recovery, mixed(data()))[0], expected)
    other = type(recovery)(**FAST, seed=1)
    assert not close_weights(trained(other)[0], expected, atol=1e-6)


@each
def test_zeros_stay_if_asked(recovery):
    def zeros_after(**settings):
        teacher = toy_cross_encoder('bert')
        student = copy.deepcopy(teacher)
        weight = student.model.bert.encoder.layer[0].output.dense.weight
        with torch.no_grad():
            weight[::2, 1::3] = 0
        before = weight.detach().clone()
        type(recovery)(**FAST, **settings).recover(student, teacher, data())
        assert not torch.equal(weight[1::2], before[1::2])
        return float((weight[::2, 1::3] == 0).double().mean())

    assert zeros_after(keep_zeros=True) == 1 and zeros_after() == 0


def test_electra_keeps_what_widens_its_embeddings():
    teacher = toy_cross_encoder('electra')
    student = pruned(teacher)
    before = weights(student)
    Distillation(**FAST).recover(student, teacher, data())
    changed = {name for name, tensor in weights(student).items() if not torch.equal(tensor, before[name])}
    expected = {name for name in before if 'embeddings' not in name}
    assert expected - changed <= {name for name in before if 'key.bias' in name} and changed <= expected


# -- errors


@pytest.mark.parametrize(
    'recovery, validation, message',
    [
        (Distillation(hidden=-1.0), None, 'hidden=-1.0'),
        (Distillation(negatives=-0.5), None, 'negatives=-0.5'),
        (Distillation(epochs=0), None, 'epochs=0'),
        (Distillation(texts_per_query=1), None, 'texts_per_query must be 2 or more; got texts_per_query=1'),
        (FineTuning(learning_rate=0.0), None, 'learning_rate=0.0'),
        (Distillation(), data([2, 3], [0]), 'none of the 2 validation queries'),
        (FineTuning(), data([2], labels=[('q7', 'd0', 1)]), 'none of the 4 rows is judged'),
    ],
)
def test_errors_before_any_work(monkeypatch, recovery, validation, message):
    teacher = toy_cross_encoder('bert')
    student = pruned(teacher)
    monkeypatch.setattr(type(teacher), 'score', None)
    with pytest.raises(ValueError, match=message):
        recovery.recover(student, teacher, data([0, 1]), validation)


def test_one_text_is_nothing_to_compare(monkeypatch):
    teacher = toy_cross_encoder('bert')
    student = pruned(teacher)
    monkeypatch.setattr(type(teacher), 'score', None)
    with pytest.raises(ValueError, match='two texts to compare'):
        Distillation(negatives=0.0).recover(student, teacher, data(texts=[0]))


def test_fine_tuning_needs_judgements_that_differ():
    with pytest.raises(ValueError, match='give qrels_tr'):
        trained(FineTuning(), FitData(data().frame))
    with pytest.raises(ValueError, match='labels'):
        trained(FineTuning(), data(labels=[(f'q{i}', f'd{j}', i) for i in range(4) for j in range(4)]))
