"""The scikit-learn face: scikit-learn's own checks, oracles, routing, tables, errors."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from fishr.algorithms import ALGORITHMS, ERM, Fishr
from fishr.data.sampling import split_indices
from fishr.errors import ConfigError, FishrError, InputError, NonFiniteLossError
from fishr.estimator import FishrClassifier, FishrRegressor
from fishr.functional import domain_gradient_variances, loss_residuals, variance_penalty

NO_DOMAINS = "Fishr compares domains, and fit was given none, so this is ERM"
SHIPPED = list(ALGORITHMS._items)
SEES_THE_BATCH = {"arm", "mtl"}
FOR_CLASSES = {"sd", "rsc", "cdann", "sagnet", "selfreg", "hgp", "hutchinson", "cma"}


@pytest.mark.filterwarnings(f"ignore:{NO_DOMAINS}")
@parametrize_with_checks([FishrClassifier(), FishrRegressor(), FishrClassifier("erm")])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def draw(num_samples=240, num_domains=3, seed=0):
    """Two classes that lie apart, domains that are shifted and unequally noisy."""
    rng = np.random.default_rng(seed)
    y, domains = rng.integers(2, size=num_samples), np.arange(num_samples) % num_domains
    noise = rng.normal(size=(num_samples, 4)) * (0.5 + domains[:, None])
    return (1.5 * (2 * y[:, None] - 1) + domains[:, None] + noise).astype(np.float32), y, domains


def draw_numbers(num_outputs=None, seed=0):
    X, _, domains = draw(seed=seed)
    weights = np.random.default_rng(1).normal(size=(4, num_outputs or 1))
    y = StandardScaler().fit_transform(X) @ weights
    return X, y if num_outputs else y[:, 0], domains


X, Y, DOMAINS = draw()


def small(estimator=FishrClassifier, algorithm="fishr", **parameters):
    return estimator(algorithm, **{"hidden": (8,), "epochs": 20, "batch_size": 20, "random_state": 0, **parameters})


def weights_of(model):
    return torch.cat([weights.detach().flatten() for weights in model.network_.parameters()])


def same(one, other):
    return torch.equal(weights_of(one), weights_of(other))


# What is learned


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_linear_model_trained_by_erm_is_logistic_regression(num_classes):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3))
    y = (X @ rng.normal(size=(3, num_classes)) + rng.gumbel(size=(200, num_classes))).argmax(1)
    model = FishrClassifier("erm", hidden=(), batch_size=None, epochs=2000, lr=0.02, random_state=0).fit(X, y)
    expected = LogisticRegression(C=1e9, tol=1e-8, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), expected.predict_proba(X), atol=1e-4)
    decisions, others = (side.decision_function(X) for side in (model, expected))
    if num_classes > 2:  # a constant added to all logits changes nothing
        decisions, others = (values - values.mean(1, keepdims=True) for values in (decisions, others))
    np.testing.assert_allclose(decisions, others, atol=2e-3)


@pytest.mark.parametrize("num_outputs", [None, 2])
def test_a_linear_model_trained_by_erm_is_linear_regression(num_outputs):
    X, y, _ = draw_numbers(num_outputs)
    y = y + np.random.default_rng(2).normal(size=y.shape)
    X = StandardScaler().fit_transform(X)
    model = FishrRegressor("erm", hidden=(), batch_size=None, epochs=2000, lr=0.02, random_state=0).fit(X, y)
    expected = LinearRegression().fit(X, y).predict(X)
    assert model.predict(X).shape == y.shape
    np.testing.assert_allclose(model.predict(X), expected, atol=1e-4)


def test_a_class_weight_is_as_good_as_copies_of_the_samples():
    again = np.concatenate([np.arange(len(Y)), np.flatnonzero(Y == 1), np.flatnonzero(Y == 1)])
    parameters = {"hidden": (), "batch_size": None, "epochs": 300, "lr": 0.02}
    plain = small(algorithm="erm", **parameters).fit(X, Y)
    weighted = small(algorithm="erm", class_weight={1: 3.0}, **parameters).fit(X, Y)
    copied = small(algorithm="erm", **parameters).fit(X[again], Y[again])
    np.testing.assert_allclose(weighted.predict_proba(X), copied.predict_proba(X), atol=1e-3)
    assert (weighted.predict_proba(X) - plain.predict_proba(X))[:, 1].mean() > 0.02


def test_balanced_class_weights():
    names = np.where(np.arange(len(Y)) < 60, "rare", "common")
    given = small(class_weight={"common": 240 / (2 * 180), "rare": 240 / (2 * 60)}).fit(X, names, domains=DOMAINS)
    assert same(small(class_weight="balanced").fit(X, names, domains=DOMAINS), given)
    assert not same(small().fit(X, names, domains=DOMAINS), given)


def test_fishr_brings_the_gradient_variances_of_the_domains_together():
    X, y, domains = draw(900)
    order = np.argsort(domains, kind="stable")
    distances = {}
    for algorithm in ("erm", "fishr"):
        model = FishrClassifier(algorithm, hidden=(16,), epochs=40, random_state=0).fit(X, y, domains=domains)
        features = model.network_[0](torch.from_numpy(X[order]))
        residuals = loss_residuals(nn.CrossEntropyLoss(), model.network_[1](features), torch.from_numpy(y[order]))
        distances[algorithm] = variance_penalty(domain_gradient_variances(features, residuals, (300,) * 3, 3)).item()
        assert model.score(X, y) > 0.8
    assert distances["fishr"] < 0.5 * distances["erm"]


@pytest.mark.parametrize("name", SHIPPED)
def test_each_algorithm_trains_a_classifier_or_refuses(name):
    model = small(algorithm=name, lr=0.01, hidden=(16,))
    if name in SEES_THE_BATCH:
        with pytest.raises(ConfigError, match=r"predicts with a network of its own .* train it with fishr\.train"):
            model.fit(X, Y, domains=DOMAINS)
        return
    model.fit(X, Y, domains=DOMAINS)
    assert model.algorithm_ is ALGORITHMS[name]
    assert model.score(X, Y) > 0.75


@pytest.mark.parametrize("num_outputs", [None, 2])
@pytest.mark.parametrize("name", SHIPPED)
def test_each_algorithm_trains_a_regressor_or_refuses(name, num_outputs):
    X, y, domains = draw_numbers(num_outputs)
    model = small(FishrRegressor, name, lr=0.01, hidden=(16,))
    if name in FOR_CLASSES | SEES_THE_BATCH:
        with pytest.raises(ConfigError, match=r"presupposes classes, .* such as erm, fishr|a network of its own"):
            model.fit(X, y, domains=domains)
        return
    model.fit(X, y, domains=domains)
    assert model.predict(X).shape == y.shape
    assert model.score(X, y) > 0.3


def test_an_algorithm_by_its_class():
    assert same(small(algorithm=Fishr).fit(X, Y, domains=DOMAINS), small().fit(X, Y, domains=DOMAINS))


# Batches and the run's length


class Recorder(ERM):
    """Keeps what the last fit showed it."""

    def setup(self):
        type(self).batches, type(self).length = [], self.steps

    def training_step(self, batch, step, optimizers):
        assert step == len(self.batches)
        self.batches.append(batch)
        return super().training_step(batch, step, optimizers)


def recorded(domains=DOMAINS, **parameters):
    """Batches of a fit on inputs that are the rows' numbers."""
    X = np.arange(len(domains), dtype=np.float32)[:, None]
    small(algorithm=Recorder, lr=1e-9, **parameters).fit(X, Y[: len(domains)], domains=domains)
    return Recorder.batches


def test_each_batch_has_as_many_samples_of_each_domain():
    names = np.array(["b", "a", "c"])[DOMAINS]
    batches = recorded(names, batch_size=7, epochs=3)
    assert len(batches) == Recorder.length == 3 * 12  # 240 samples, 21 of them in a batch
    seen = set()
    for batch in batches:
        rows = batch.inputs[:, 0].long().numpy()
        assert batch.sizes == (7, 7, 7)
        assert names[rows].tolist() == ["a"] * 7 + ["b"] * 7 + ["c"] * 7
        assert batch.targets.tolist() == Y[rows].tolist()
        seen |= set(rows.tolist())
    assert len(seen) > 200


def test_without_a_batch_size_a_batch_is_everything():
    batches = recorded(DOMAINS[:10], batch_size=None, epochs=3)
    assert len(batches) == Recorder.length == 3
    for batch in batches:
        assert batch.sizes == (4, 3, 3)
        assert batch.inputs[:, 0].tolist() == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]


# Without domains


def test_without_domains_it_is_erm_and_says_so_once():
    with pytest.warns(UserWarning, match=NO_DOMAINS) as said:
        model = small(hparams={"strength": 0.1, "weight_decay": 0.1}).fit(X, Y)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert model.algorithm_ is ERM
    assert model.domains_ is None
    assert same(model, small(algorithm="erm", hparams={"weight_decay": 0.1}).fit(X, Y))
    assert not same(model, small(algorithm="erm").fit(X, Y))


@pytest.mark.parametrize("name", ["erm", "irm"])
def test_an_algorithm_for_one_domain_needs_none(name):
    model = small(algorithm=name).fit(X, Y)  # a warning would be an error
    assert model.algorithm_ is ALGORITHMS[name]


def test_one_domain_is_too_few():
    with pytest.raises(ConfigError, match="Fishr compares domains and needs at least 2 to train on, got 1"):
        small().fit(X, Y, domains=np.zeros(len(Y)))


# Tables, labels, layouts


LABELS = np.array(["no", "yes"])[Y]
PLACES = np.array(["Oslo", "Rome", "Bern"])[DOMAINS]


@pytest.fixture(scope="module")
def named():
    return small().fit(X, LABELS, domains=PLACES)


def test_labels_and_domains_by_name(named):
    assert named.classes_.tolist() == ["no", "yes"]
    assert named.domains_.tolist() == ["Bern", "Oslo", "Rome"]
    assert accuracy_score(LABELS, named.predict(X)) == named.score(X, LABELS) > 0.75
    assert not hasattr(named, "feature_names_in_")


@pytest.mark.parametrize("library", [pd, pl], ids=["pandas", "polars"])
def test_tables(named, library):
    table = library.DataFrame({name: X[:, column] for column, name in enumerate("abcd")})
    model = small().fit(table, library.Series(LABELS), domains=library.Series(PLACES))
    assert same(model, named)
    assert model.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(model.predict(table), named.predict(X))
    renamed = library.DataFrame({name: X[:, column] for column, name in enumerate("abce")})
    with pytest.raises(ValueError, match="The feature names should match"):
        model.predict(renamed)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "laid",
    [np.asfortranarray, read_only, lambda array: array[::-1].copy()[::-1], np.float64, np.ndarray.tolist],
    ids=["Fortran", "read-only", "backwards", "float64", "lists"],
)
def test_layouts(named, laid):
    model = small().fit(laid(X), LABELS, domains=PLACES)
    assert same(model, named)
    np.testing.assert_allclose(model.predict_proba(laid(X)), named.predict_proba(X), rtol=1e-5, atol=1e-6)


def test_predictions_have_the_precision_of_the_inputs(named):
    outputs = [named.predict_proba(X), named.decision_function(X), named.predict_proba(X.astype(np.float64))]
    assert [output.dtype for output in outputs] == [np.float32, np.float32, np.float64]
    assert all(weights.dtype == torch.float32 for weights in named.network_.parameters())


def test_whole_numbers():
    counts = np.round(X).astype(np.int16)
    assert same(small().fit(counts, Y, domains=DOMAINS), small().fit(counts.astype(float), Y, domains=DOMAINS))


def test_many_rows_are_predicted_in_parts(named, monkeypatch):
    expected = named.predict_proba(X)
    monkeypatch.setattr("fishr.estimator.ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(named.predict_proba(X), expected, rtol=1e-5)


# State


def test_clones_and_pickles(named):
    again = pickle.loads(pickle.dumps(named))
    np.testing.assert_array_equal(again.predict_proba(X), named.predict_proba(X))
    unfitted = clone(named)
    assert unfitted.get_params() == named.get_params()
    assert not hasattr(unfitted, "network_")
    assert all(weights.grad is None for weights in named.network_.parameters())


def test_the_random_state_is_all_that_is_random(named):
    before = torch.get_rng_state()
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert same(small().fit(X, LABELS, domains=PLACES), named)
    torch.set_rng_state(before)
    model = small(hparams={"dropout": 0.5}).fit(X, LABELS, domains=PLACES)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(small(hparams={"dropout": 0.5}).fit(X, LABELS, domains=PLACES), model)
    assert not same(small(random_state=1).fit(X, LABELS, domains=PLACES), named)
    assert not same(small(random_state=None).fit(X, LABELS, domains=PLACES), named)
    generator = np.random.RandomState(0)
    assert same(small(random_state=generator).fit(X, LABELS, domains=PLACES), named)
    assert not same(small(random_state=generator).fit(X, LABELS, domains=PLACES), named)


def test_a_warm_start_goes_on_from_the_weights():
    model = small(algorithm="erm", warm_start=True).fit(X, Y)
    cold = clone(model).fit(X, Y)
    first = model.loss_curve_
    model.fit(X, Y)
    assert model.loss_curve_[0] < first[-1] + 0.05 < first[0]
    assert model.n_epochs_ == 20
    assert same(cold.set_params(warm_start=False).fit(X, Y), small(algorithm="erm").fit(X, Y))
    assert not same(cold, model)


def test_a_warm_start_that_fails_leaves_the_model_as_it_was():
    model = small(warm_start=True).fit(X, Y, domains=DOMAINS)
    before = weights_of(model)
    with pytest.raises(InputError, match=re.escape("continues with the classes [0, 1], got [0, 1, 2]")):
        model.fit(X, np.arange(len(Y)) % 3, domains=DOMAINS)
    with pytest.raises(ValueError, match="X has 3 features, but FishrClassifier is expecting 4"):
        model.fit(X[:, :3], Y, domains=DOMAINS)
    with pytest.raises(ConfigError, match=re.escape("continues a network with hidden=(8,), got (16,): set it back")):
        copy.deepcopy(model).set_params(hidden=(16,)).fit(X, Y, domains=DOMAINS)
    with pytest.raises(NonFiniteLossError):
        model.fit(1e30 * X, Y, domains=DOMAINS)
    assert torch.equal(weights_of(model), before)
    numbers = small(FishrRegressor, "erm", warm_start=True, epochs=1).fit(X, X[:, :2])
    with pytest.raises(InputError, match="continues with 2 outputs, got 1 targets of each sample"):
        numbers.fit(X, X[:, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_fitted_on_a_gpu_predicts_on_the_cpu():
    model = small(device="cuda").fit(X, Y, domains=DOMAINS)
    assert model.score(X, Y) > 0.8
    assert {weights.device.type for weights in model.network_.parameters()} == {"cpu"}


# Early stopping


NOISE = np.random.default_rng(3).integers(2, size=len(Y))


def rows_aside(fraction=0.25):
    """Rows of each domain that a fit with random_state=0 sets aside."""
    seed = int(check_random_state(0).randint(2**31))
    rows = [np.flatnonzero(np.equal(DOMAINS, domain)) for domain in range(3)]
    return [of_domain[split_indices(80, fraction, seed, index)[1].numpy()] for index, of_domain in enumerate(rows)]


def test_early_stopping_keeps_the_best_weights():
    y = np.where(np.arange(len(Y)) % 3 == 0, NOISE, Y)  # so that more training makes it worse
    parameters = {"early_stopping": True, "validation_fraction": 0.25, "n_iter_no_change": 4, "epochs": 200, "lr": 0.05}
    model = small(algorithm="erm", **parameters).fit(X, y, domains=DOMAINS)
    scores = model.validation_scores_
    assert model.best_epoch_ + 4 == model.n_epochs_ == len(scores) == len(model.loss_curve_) < 200
    assert model.best_epoch_ == 1 + np.argmax(scores)
    assert max(scores) == pytest.approx(np.mean([model.score(X[rows], y[rows]) for rows in rows_aside()]))
    assert max(scores) > scores[-1]


def test_rows_set_aside_are_not_trained_on():
    batches = recorded(early_stopping=True, validation_fraction=0.25, n_iter_no_change=20)
    trained_on = {int(row) for batch in batches for row in batch.inputs[:, 0]}
    assert len(rows_aside()[0]) == 20
    assert trained_on.isdisjoint(np.concatenate(rows_aside()).tolist())
    assert len(trained_on) > 170
    assert Recorder.length == 20 * 3  # of 180 samples


def test_early_stopping_waits_for_the_algorithm():
    parameters = {"early_stopping": True, "validation_fraction": 0.25, "n_iter_no_change": 1, "hidden": (64,)}
    model = small(**parameters, lr=0.02).fit(X, NOISE, domains=DOMAINS)
    scores = model.validation_scores_
    assert max(scores[:7]) > max(scores[7:])  # epoch 8 of 20 is the first beyond 30 % and 5 % of the steps
    assert 8 <= model.best_epoch_ == model.n_epochs_ - 1
    never = small(**parameters, hparams={"switch_on": 1.0}).fit(X, NOISE, domains=DOMAINS)
    assert never.best_epoch_ == never.n_epochs_ == 20


def test_early_stopping_of_a_regressor_looks_at_the_squared_error():
    X, y, domains = draw_numbers(2)
    model = small(FishrRegressor, early_stopping=True, validation_fraction=0.25).fit(X, y, domains=domains)
    of_domains = [-np.mean((model.predict(X[rows]) - y[rows]) ** 2) for rows in rows_aside()]
    assert model.validation_scores_[model.best_epoch_ - 1] == pytest.approx(np.mean(of_domains), rel=1e-4)


def test_without_early_stopping_the_last_weights_are_kept(named):
    assert named.validation_scores_ is None
    assert named.best_epoch_ == named.n_epochs_ == len(named.loss_curve_) == 20


# Routing


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


@pytest.fixture
def no_routing():
    with sklearn.config_context(enable_metadata_routing=False):
        yield


def held_out_scores(estimator):
    """Of each domain, by an estimator fitted on the others."""
    scores = []
    for domain in range(3):
        held_out = np.equal(DOMAINS, domain)
        scaler = StandardScaler().fit(X[~held_out])
        model = clone(estimator).fit(scaler.transform(X[~held_out]), Y[~held_out], domains=DOMAINS[~held_out])
        scores.append(model.score(scaler.transform(X[held_out]), Y[held_out]))
    return scores


QUICK = small(epochs=4, hparams={"switch_on": 0})
PIPELINE = make_pipeline(StandardScaler(), QUICK)


def test_domains_find_their_way(routing):
    fitted = clone(PIPELINE).fit(X, Y, domains=DOMAINS)
    assert fitted[-1].domains_.tolist() == [0, 1, 2]
    given = {"domains": DOMAINS, "groups": DOMAINS}
    scores = cross_val_score(PIPELINE, X, Y, cv=LeaveOneGroupOut(), params=given)
    np.testing.assert_allclose(scores, held_out_scores(QUICK))
    grid = {"fishrclassifier__hparams": [{"strength": 0.1}, {"strength": 10.0, "switch_on": 0}]}
    search = GridSearchCV(PIPELINE, grid, cv=LeaveOneGroupOut()).fit(X, Y, **given)
    assert search.best_estimator_[-1].domains_.tolist() == [0, 1, 2]
    for number, hparams in enumerate(grid["fishrclassifier__hparams"]):
        expected = held_out_scores(clone(QUICK).set_params(hparams=hparams))
        found = [search.cv_results_[f"split{domain}_test_score"][number] for domain in range(3)]
        np.testing.assert_allclose(found, expected)


def test_domains_find_their_way_without_routing_too(no_routing):
    given = {"fishrclassifier__domains": DOMAINS}
    assert clone(PIPELINE).fit(X, Y, **given)[-1].domains_.tolist() == [0, 1, 2]
    scores = cross_val_score(PIPELINE, X, Y, groups=DOMAINS, cv=LeaveOneGroupOut(), params=given)
    np.testing.assert_allclose(scores, held_out_scores(QUICK))
    grid = {"fishrclassifier__lr": [1e-3, 1e-2]}
    search = GridSearchCV(PIPELINE, grid, cv=LeaveOneGroupOut()).fit(X, Y, groups=DOMAINS, **given)
    assert search.best_estimator_[-1].domains_.tolist() == [0, 1, 2]


def test_domains_can_be_kept_from_it(routing):
    with pytest.raises(TypeError, match="domains"):
        make_pipeline(StandardScaler(), small().set_fit_request(domains=False)).fit(X, Y, domains=DOMAINS)


def test_targets_that_are_standardised(routing):
    X, y, domains = draw_numbers()
    model = TransformedTargetRegressor(small(FishrRegressor, lr=0.01), transformer=StandardScaler())
    model.fit(X, 1e4 + 1e3 * y, domains=domains)
    assert model.regressor_.domains_.tolist() == [0, 1, 2]
    assert model.score(X, 1e4 + 1e3 * y) > 0.5


# Errors


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"algorithm": "fisher"}, "unknown algorithm 'fisher'; did you mean 'fish"),
        ({"algorithm": 3}, "algorithm must be a name or a subclass of fishr.algorithms.Algorithm, got 3"),
        ({"algorithm": nn.Linear}, "algorithm must be a name or a subclass of fishr.algorithms.Algorithm, got <class"),
        ({"hidden": 128}, r"hidden must be a tuple of the hidden layers' widths, such as \(128,\), got 128"),
        ({"hidden": (8, 0)}, r"hidden must be a tuple of .*, got \(8, 0\)"),
        ({"epochs": 0}, "epochs must be a whole number, at least 1, got 0"),
        ({"epochs": True}, "epochs must be a whole number, at least 1, got True"),
        ({"n_iter_no_change": 2.5}, "n_iter_no_change must be a whole number, at least 1, got 2.5"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, got 1.0"),
        ({"validation_fraction": "a tenth"}, "validation_fraction must lie between 0 and 1, got 'a tenth'"),
        ({"hparams": "strength"}, "hparams must be a dict of the algorithm's hyperparameters, got 'strength'"),
        ({"hparams": {"lr": 0.1}}, "hparams must not hold 'lr': give it as the estimator's own parameter lr"),
        ({"hparams": {"batch_size": 8}}, "hparams must not hold 'batch_size'"),
        ({"hparams": {"strenght": 1.0}}, "unknown hyperparameter 'strenght'; did you mean 'strength'"),
        ({"hparams": {"ema": 1.0}}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, or null for all samples, got 0"),
        ({"algorithm": "irm", "batch_size": 1}, "batch_size must be at least 2"),
        ({"class_weight": {2: 3.0}}, r"class_weight names 2, which is no class; the classes are \[0, 1\]"),
        ({"class_weight": "even"}, "class_weight must be None, 'balanced' or a dict of weights by label, got 'even'"),
        ({"algorithm": "hgp", "class_weight": "balanced"}, "got CrossEntropyLoss with weights"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_parameters_that_cannot_be(parameters, message):
    with pytest.raises(ConfigError, match=message):
        small(**parameters).fit(X, Y, domains=DOMAINS)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError, match=r"hidden must be .*; epochs must be .*; hparams must not hold 'lr'"):
        small(hidden=128, epochs=0, hparams={"lr": 1.0}).fit(X, Y)


def test_a_class_that_a_part_of_the_data_lacks_may_have_a_weight():
    small(class_weight={0: 1.0, 1: 2.0, 2: 3.0}).fit(X, Y, domains=DOMAINS)


def test_numbers_of_numpy_are_numbers():
    parameters = {"epochs": np.int64(2), "batch_size": np.int64(20), "lr": np.float32(0.5), "hidden": [np.int32(8)]}
    small(**parameters, hparams={"switch_on": np.int64(3)}).fit(X, Y, domains=DOMAINS)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (DOMAINS[:-1], r"domains must be the domain of each of the 240 samples, \[sample\], got shape \[239\]"),
        (DOMAINS[:, None], r"got shape \[240, 1\]"),
        ("Oslo", r"got shape \[\]"),
        (np.where(DOMAINS == 0, np.nan, DOMAINS), "domains must be all names or all numbers, none of them missing"),
        (np.where(DOMAINS == 0, None, PLACES), "none of them missing"),
        (pd.Series(PLACES).where(DOMAINS > 0), "none of them missing"),
        (pd.Series(DOMAINS, dtype="Int64").where(DOMAINS > 0), "none of them missing"),
        (pl.Series([*PLACES.tolist()[:-1], None]), "none of them missing"),
        (np.where(DOMAINS == 0, 0, PLACES.astype(object)), "domains must be all names or all numbers"),
    ],
)
def test_domains_that_do_not_fit(domains, message):
    with pytest.raises(InputError, match=message):
        small().fit(X, Y, domains=domains)


@pytest.mark.parametrize(
    ("domains", "where"),
    [(None, "there are 240 samples"), (np.where(np.arange(240) < 9, "few", "many"), "'few' has 9")],
)
def test_too_few_samples_to_set_aside(domains, where):
    model = small(algorithm="erm", early_stopping=True, validation_fraction=0.1 if domains is not None else 1e-3)
    with pytest.raises(InputError, match=f"{where}.*, too few to set a share of .* aside: raise validation_fraction"):
        model.fit(X, Y, domains=domains)


def test_too_few_samples_for_a_batch_of_all():
    with pytest.raises(
        InputError, match="IRM needs 2 samples of each domain in a batch, and the smallest domain has 1"
    ):
        small(algorithm="irm", batch_size=None).fit(X, Y, domains=np.arange(240) == 0)


def test_one_class():
    with pytest.raises(InputError, match="y has one class, 'no': at least 2 are needed"):
        small().fit(X, np.full(len(Y), "no"), domains=DOMAINS)


def test_a_loss_that_is_not_finite():
    with pytest.raises(NonFiniteLossError, match=r"the loss of epoch \d is nan: standardise the features"):
        small().fit(1e30 * X, Y, domains=DOMAINS)


def test_errors_are_those_of_scikit_learn_and_ours():
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(FishrError):
        small(epochs=0).fit(X, Y)


def test_a_penalty_weight_takes_the_place_of_the_strength():
    X, y, domains = drawn_for_weights()
    weak, strong, followed = (
        FishrClassifier("fishr", hidden=(8,), epochs=10, hparams=hparams, random_state=0).fit(X, y, domains=domains)
        for hparams in ({"penalty_weight": 0.0}, {"penalty_weight": 1e4}, {"penalty_weight": 1e4, "strength": 0.5})
    )
    probabilities = [model.predict_proba(X) for model in (weak, strong, followed)]
    assert not np.allclose(probabilities[0], probabilities[1], atol=1e-3)
    assert not np.allclose(probabilities[1], probabilities[2], atol=1e-3)


def drawn_for_weights():
    rng = np.random.default_rng(0)
    y, domains = rng.integers(2, size=200), rng.integers(2, size=200)
    return rng.normal(size=(200, 4)) + y[:, None] * (1 + 2 * domains[:, None]), y, domains


def test_fits_in_threads_are_reproducible_and_leave_torch_as_it_was():
    X, y, _ = drawn_for_weights()
    before = torch.get_rng_state()

    def fit(_: int) -> np.ndarray:
        model = FishrClassifier("erm", hidden=(8,), epochs=3, hparams={"dropout": 0.5}, random_state=0)
        return model.fit(X, y).predict_proba(X)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fit, range(8)))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fit_on_a_cpu_leaves_cuda_alone(monkeypatch):
    X, y, _ = drawn_for_weights()
    forked, fork_rng = [], torch.random.fork_rng
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: forked.append(devices) or fork_rng(devices))
    monkeypatch.setattr("torch.manual_seed", lambda seed: pytest.fail("CUDA is seeded too"))
    FishrClassifier("erm", hidden=(8,), epochs=1, device="cpu", random_state=0).fit(X, y)
    assert forked == [[]]


@pytest.mark.parametrize("bad", [[float("nan"), "a"], [None, "a"], [0, "a"]], ids=["nan", "none", "mixed"])
def test_lists_of_domains_are_not_taken_for_names(bad):
    X, y, _ = drawn_for_weights()
    with pytest.raises(InputError, match="domains must be all names or all numbers, none of them missing"):
        FishrClassifier("erm").fit(X, y, domains=bad * 100)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_class_weights_are_finite_and_not_negative(weight):
    X, y, _ = drawn_for_weights()
    with pytest.raises(ConfigError, match="class_weight must have finite weights of at least 0, got"):
        FishrClassifier("erm", class_weight={1: weight}).fit(X, y)


def test_weights_that_blow_up_in_the_last_step_are_no_model():
    X, y, _ = drawn_for_weights()
    with pytest.raises(NonFiniteLossError, match="the weights became NaN or infinite in the last step"):
        FishrRegressor("erm", hidden=(8,), epochs=1, batch_size=None, lr=1e39).fit(X, y)
