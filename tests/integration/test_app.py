from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError
from ray import serve
from tests.conftest import Pair, words
from tests.support.scripted_generator import ScriptedGenerator
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig

from cascade.api.keys import ApiKey, as_yaml, hash_of
from cascade.app import build
from cascade.errors import MismatchedPair, StartupError, UnsupportedModel
from cascade.local import local_server
from cascade.replica.autoscaling import TierPolicy
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_a_pair_that_shares_no_vocabulary_is_refused_by_name(toy: Pair, tmp_path: Path) -> None:
    """Before anything is deployed, and with the tokens that differ."""
    other = tmp_path / "other"
    shutil.copytree(toy.expert.path, other)
    tokenizer: Any = words(8)
    vocabulary = tokenizer.get_vocab() | {"C": 3, "D": 2}
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
        vocabulary,
        unk_token="A",  # noqa: S106 - a word
    )
    tokenizer.save_pretrained(other)
    drafter = {"model": str(toy.drafter.path), "vocabulary": "shared"}
    settings = toy.settings(drafter=drafter, expert={"model": str(other)})
    with pytest.raises(MismatchedPair, match=r"id 2 is 'C' to the drafter and 'D' to the expert"):
        build(settings)


async def test_a_padded_vocabulary_is_served(toy: Pair, tmp_path: Path) -> None:
    """Logits without a token are never written, however likely."""
    padded = tmp_path / "padded"
    known: dict[str, Any] = toy.drafter.model.config.to_dict()
    config = LlamaConfig.from_dict(known | {"vocab_size": 13})
    model = LlamaForCausalLM(config)
    model.save_pretrained(padded)
    words(8).save_pretrained(padded)
    async with local_server(toy.settings(drafter={"model": str(padded)})) as running:
        assert running.drafter.describe().vocab_size == running.expert.describe().vocab_size == 8


def test_a_model_that_is_nowhere_is_refused(toy: Pair, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="nowhere"):
        build(toy.settings(expert={"model": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize(
    "count",
    [
        {"num_replicas": 3},
        {
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": 4,
                "target_ongoing_requests": 8,
            }
        },
    ],
)
def test_serve_takes_a_tiers_counts_and_resources(count: dict[str, Any]) -> None:
    resources = {"num_cpus": 2, "num_gpus": 0.5, "resources": {"tier": 1}}
    settings = Application.model_validate(
        {"drafter": {"deployment": {**count, "ray_actor_options": resources}}}
    )
    tier = settings.drafter
    options = tier.deployment.options(environment=tier.environment())
    deployed: Any = serve.deployment(name="Drafter")(type("Tier", (), {})).options(**options)
    given = deployed.ray_actor_options
    assert {key: given[key] for key in resources} == resources
    assert given["runtime_env"]["env_vars"]["OMP_WAIT_POLICY"] == "PASSIVE"
    config = deployed._deployment_config.autoscaling_config
    assert (config is None) == ("num_replicas" in count)


def test_a_model_that_cannot_be_shared_is_refused_before_anything_is_deployed(toy: Pair) -> None:
    expert = {"model": str(toy.expert.path), "engine": {"tensor_parallel": 3}}
    with pytest.raises(UnsupportedModel, match=r"4 attention heads and 2 .*, which 3 devices"):
        build(toy.settings(expert=expert))


def test_serve_takes_a_tiers_own_way_to_scale() -> None:
    """With the policy by its import path, and what one replica should bear."""
    settings = Application.model_validate(
        {
            "drafter": {"scaling": {"min_replicas": 0, "max_replicas": 4, "wait_s": 0.02}},
            "expert": {
                "scaling": {"max_replicas": 2, "backlog": 3},
                "deployment": {"max_ongoing_requests": 16},
            },
        }
    )
    assert not settings.drafter.always_there
    assert settings.expert.always_there
    for tier, bounds in ((settings.drafter, (0, 4)), (settings.expert, (1, 2))):
        options = tier.serve_options(environment={})
        deployed: Any = serve.deployment(name="Tier")(type("Tier", (), {})).options(**options)
        config = deployed._deployment_config.autoscaling_config
        assert (config.min_replicas, config.max_replicas) == bounds
        assert config.policy.get_policy() is TierPolicy
        TierPolicy(**config.policy.policy_kwargs)
    kwargs = config.policy.policy_kwargs
    assert (kwargs["backlog"], kwargs["sessions"], kwargs["cache"]) == (3, 12, 0.8)


@pytest.mark.parametrize(
    ("expert", "surge"),
    [
        ({}, 1),
        ({"deployment": {"num_replicas": 2}}, 0),
        ({"deployment": {"max_surge_percent": 0}}, 0),
        ({"deployment": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 3}}}, 1),
        ({"scaling": {"min_replicas": 0, "max_replicas": 3}}, 1),
        ({"scaling": {"min_replicas": 2, "max_replicas": 3}}, 0),
        (
            {
                "scaling": {"min_replicas": 2, "max_replicas": 3},
                "deployment": {"max_surge_percent": 1},
            },
            1,
        ),
    ],
)
def test_where_one_replica_may_be_alone_its_successor_starts_first(
    expert: dict[str, Any], surge: int
) -> None:
    settings = Application.model_validate({"expert": expert})
    deployed: Any = serve.deployment(name="Tier")(type("Tier", (), {}))
    config = deployed.options(**settings.expert.serve_options(environment={}))._deployment_config
    assert config.max_surge_percent == surge


def test_serve_places_the_processes_of_a_sharded_model_on_one_node() -> None:
    """Each has a bundle of what the actor options say; the replica is the first of them."""
    actor = {"num_cpus": 2, "num_gpus": 1, "accelerator_type": "H100", "resources": {"fast": 1}}
    expert = {"engine": {"tensor_parallel": 4}, "deployment": {"ray_actor_options": actor}}
    settings = Application.model_validate({"expert": expert, "drafter": {}})
    deployed: Any = serve.deployment(name="Tier")(type("Tier", (), {}))
    config = deployed.options(**settings.expert.serve_options(environment={}))._replica_config
    bundle = {"CPU": 2, "GPU": 1, "accelerator_type:H100": 0.001, "fast": 1}
    assert config.placement_group_bundles == [bundle] * 4
    assert config.placement_group_strategy == "STRICT_PACK"
    assert "placement_group_bundles" not in settings.drafter.serve_options(environment={})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"drafter": {"colour": "x"}}, "drafter.colour"),
        ({"defaults": {"rule": {"kind": "chow", "alpha": 2}}}, "defaults.rule.chow.alpha"),
        ({"router": {"draft_tokens": 0}}, "router.draft_tokens"),
        (
            {"expert": {"deployment": {"num_replicas": 2, "autoscaling_config": {}}}},
            "num_replicas or autoscaling_config",
        ),
        (
            {"expert": {"deployment": {"num_replicas": 2}, "scaling": {"max_replicas": 2}}},
            "scaling or deployment.num_replicas",
        ),
        ({"drafter": {"scaling": {"max_replicas": 2, "cache": 0.5}}}, "drafter.scaling.cache"),
        ({"expert": {"engine": {"tensor_parallel": 0}}}, "expert.engine.tensor_parallel"),
        (
            {"expert": {"engine": {"tensor_parallel": 2, "path": "lean"}}},
            "path is lean, which runs on one device",
        ),
        (
            {
                "expert": {
                    "engine": {"tensor_parallel": 2},
                    "deployment": {"placement_group_bundles": [{"GPU": 2}]},
                }
            },
            "placement_group_bundles follows from engine.tensor_parallel",
        ),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Application.model_validate(wrong)
    places = [".".join(map(str, one["loc"])) + one["msg"] for one in refused.value.errors()]
    assert any(named in place for place in places)


def keys(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the place of every setting."""
    for one in (schema, *schema.get("anyOf", ())):
        inner = root["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one
        for name, below in inner.get("properties", {}).items():
            yield (name,)
            yield from ((name, *rest) for rest in keys(below, root))


KEYS = list(keys(Application.model_json_schema(), Application.model_json_schema()))


@pytest.mark.parametrize("place", KEYS, ids=".".join)
def test_a_mistyped_key_is_answered_with_the_nearest_in_our_words(place: tuple[str, ...]) -> None:
    *outer, name = place
    tree: Any = {f"{name}x": 1}
    for part in reversed(outer):
        tree = {part: tree}
    with pytest.raises(ValidationError) as refused:
        Application.model_validate(tree)
    found = {".".join(map(str, one["loc"])): one["msg"] for one in refused.value.errors()}
    near = found[".".join((*outer, f"{name}x"))]
    assert re.match(r"is unknown here; wanted one of .*; did you mean `\w+`\?$", near)
    assert not any(
        re.search(r"Input |Extra|keyword|Value error|required", text) for text in found.values()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"defaults": {"rule": {"kind": "tokenv3"}}}, "did you mean `token_v3`"),
        ({"defaults": {"mode": "specultive"}}, "did you mean `speculative`"),
        ({"defaults": {"rows": "spars"}}, "did you mean `sparse`"),
        ({"drafter": {"engine": {"dtype": "bfloat61"}}}, "did you mean `bfloat16`"),
        ({"expert": {"engine": {"path": "flt"}}}, "did you mean `flat`"),
    ],
)
def test_a_mistyped_value_is_answered_with_the_nearest(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Application.model_validate(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_keys": ["sk-secret"]},
        *(
            {part: {"deployment": {"ray_actor_options": {"runtime_env": {"env_vars": keys}}}}}
            for part in ("router", "drafter", "expert")
            for keys in [{"CASCADE_API_KEYS": "sk-secret"}]
        ),
    ],
)
def test_an_api_key_in_the_yaml_is_refused_and_not_repeated(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"CASCADE_API_KEYS.*`api_keys_file`") as refused:
        Application.model_validate(wrong)
    assert "sk-secret" not in str(refused.value)


def accepted(**settings: Any) -> set[str]:
    """Return which of a few keys an application with these settings accepts."""
    application = Application.model_validate(settings)
    generator = ScriptedGenerator(script=lambda _: [0])
    keys = application.serving_context(generator, application.pair()).keys
    return {"everyone"} if keys is None else {key for key in "abcde" if keys.find(key)}


def test_api_keys_come_from_the_environment_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CASCADE_API_KEYS", raising=False)
    assert accepted() == {"everyone"}
    monkeypatch.setenv("CASCADE_API_KEYS", "a, b,")
    file = tmp_path / "keys"
    file.write_text(as_yaml(ApiKey(name="c", sha256=hash_of("c"))))
    assert accepted() == {"a", "b"}
    assert accepted(api_keys_file=str(file)) == {"a", "b", "c"}
    monkeypatch.setenv("OTHER", "e")
    assert accepted(api_key_variable="OTHER") == {"e"}


@pytest.mark.parametrize("text", [None, "", "[]", "sk-secret", "- sk-secret", "{", "- name: a"])
def test_a_named_source_without_keys_does_not_leave_the_server_open(
    text: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(StartupError, match="`api_keys_file`") as refused:
        accepted(api_keys_file=str(file))
    assert "sk-secret" not in str(refused.value)
    with pytest.raises(StartupError, match="`api_key_variable` is UNSET"):
        accepted(api_key_variable="UNSET")


def test_a_recurrent_model_is_refused_before_anything_is_deployed(
    toy: Pair, tmp_path: Path
) -> None:
    """Its state cannot be rolled back, and its configuration says so."""
    folder = tmp_path / "mamba"
    MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1).save_pretrained(folder)
    words(8).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        build(toy.settings(expert={"model": str(folder)}))
