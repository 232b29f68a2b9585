"""What is checked before a file for a cluster is printed, and how values get into templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shoal.deploying import deployment as checks
from shoal.deploying.deployment import Deployment, plan_deployment
from shoal.deploying.rendering import fill
from shoal.engines.ray_learners import check_learners
from shoal.errors import ConfigError
from shoal.settings import dump_config, dump_tree, read_yaml, resolve


def written(directory: Path, text: str) -> Path:
    file = directory / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_deployment_holds_what_the_file_says_and_fits_its_groups(tmp_path: Path) -> None:
    file = written(tmp_path, "env: CartPole-v1\nseed: 3\nsampling: {groups: 12}\nactors: 2\nrun_dir: somewhere\n")
    planned = plan_deployment(file, nodes=3, cpus=8)
    assert (planned.name, planned.nodes, planned.actors_per_node) == ("cartpole-v1-ppo-3", 3, 4)
    assert yaml.safe_load(planned.settings) == {"env": {"id": "CartPole-v1"}, "seed": 3, "sampling": {"groups": 12}}
    assert planned.options == "--engine ray --address auto --actors-per-node 4"
    assert plan_deployment(file, nodes=3, cpus=2, learners=2).options == "--engine ray --address auto --actors-per-node 2 --learners 2"
    assert planned.warnings == ()


def test_a_runs_configuration_is_taken_from_its_directory(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    config, _ = resolve("CartPole-v1", {"run_dir": str(run), "seed": 5, "sampling.groups": 6, "actors": 2})
    (run / "config.yaml").write_text(dump_config(config))
    for named in (run, run / "config.yaml"):
        planned = plan_deployment(named)
        assert (planned.name, planned.actors_per_node) == ("cartpole-v1-ppo-5", 3)
        again, _ = resolve(str(written(tmp_path, planned.settings)))
        assert again.model_copy(update={"run_dir": str(run), "actors": 2}) == config


@pytest.mark.parametrize(
    ("text", "how", "part"),
    [
        ("env: CartPole-v1\nsed: 3\n", {}, "did you mean seed"),
        ("env: CartPole-v1\nalgorithm: {epochs: -1}\n", {}, r"algorithm\.epochs: should be greater than 0"),
        ("seed: 3\n", {}, "no environment"),
        ("env: CartPole-v1\n", {"nodes": 5}, r"^nodes: 5 nodes cannot share 4 groups"),
        ("env: CartPole-v1\n", {"actors_per_node": 3}, r"--actors-per-node 2 or less, or raise sampling\.groups .* to 6"),
        (
            "env: CartPole-v1\n",
            {"actors_per_node": 2, "cpus": 1},
            "^actors-per-node: 2 actors need as many cores, and a node has 1; give --cpus 2",
        ),
        ("env: CartPole-v1\n", {"name": "My_Run"}, "^name: 'My_Run' is no name for a cluster"),
        ("env: CartPole-v1\n", {"name": "a" * 41}, "^name: "),
        ("env: {id: 'callable:<lambda>'}\n", {}, "^env.id: callable:<lambda> was a Python object"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(text: str, how: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=part):
        plan_deployment(written(tmp_path, text), **how)


@pytest.mark.parametrize(
    "text",
    [
        "policy: {inference: server}",
        "learners: 65",
        "ray: {nodes: 0}",
        "mode: async",
        "algorithm: dqn\nlearners: 2\nray: {learners_on: nodes}",
        "ray: {learners_on: nodes}",
    ],
)
def test_what_training_on_a_cluster_refuses_is_refused_with_the_same_words(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"env: CartPole-v1\n{text}\n")
    with pytest.raises(ConfigError) as trained:
        resolve(str(file), {"engine": "ray", "ray.address": "auto"})
    with pytest.raises(ConfigError) as deployed:
        plan_deployment(file)
    assert str(deployed.value) == str(trained.value)


ON_NODES = "env: CartPole-v1\nlearners: 2\nray: {learners_on: nodes}\n"
ALLOWED = ON_NODES.replace("nodes}", "nodes, allow_plain_learners: true}")


@pytest.mark.parametrize(
    ("text", "nodes", "part"),
    [(ON_NODES, 2, "give --allow-plain-learners"), (ALLOWED, 1, "besides that machine the run has 0 nodes")],
    ids=["TLS", "one node"],
)
def test_learners_on_nodes_are_refused_as_the_run_on_that_cluster_would_be(text: str, nodes: int, part: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    config, _ = resolve(str(file), {"engine": "ray", "ray.address": "auto"})
    with pytest.raises(ConfigError, match=part) as trained:
        check_learners(config, {"RAY_USE_TLS": "1"}, replayed=False, others=nodes - 1)
    with pytest.raises(ConfigError) as deployed:
        plan_deployment(file, nodes=nodes)
    assert str(deployed.value) == f"{trained.value} (in {file}: ray.learners_on, ray.allow_plain_learners)"


def test_learners_on_nodes_that_are_allowed_go_without_encryption_with_a_warning(tmp_path: Path) -> None:
    planned = plan_deployment(written(tmp_path, ALLOWED), nodes=2)
    (warning,) = planned.warnings
    assert "neither encrypted nor authenticated (gloo)" in warning
    assert yaml.safe_load(planned.settings)["ray"] == {"learners_on": "nodes", "allow_plain_learners": True}


@pytest.mark.parametrize(("learners_on", "worker_gpus", "told"), [("nodes", 1, False), ("driver", 0, True)])
def test_a_node_has_a_gpu_where_a_learner_may_be(learners_on: str, worker_gpus: int, told: bool, tmp_path: Path) -> None:
    planned = plan_deployment(written(tmp_path, ALLOWED.replace("nodes,", f"{learners_on},")), nodes=2, gpus=1)
    assert (planned.gpus, planned.worker_gpus) == (1, worker_gpus)
    assert any("2 learners want a GPU each" in warning for warning in planned.warnings) is told
    assert plan_deployment(written(tmp_path, ALLOWED), nodes=2).worker_gpus == 0


def test_options_are_checked_as_those_of_a_training(tmp_path: Path) -> None:
    file = written(tmp_path, "env: CartPole-v1\n")
    with pytest.raises(ConfigError, match=r"^learners: should be less than or equal to 64, got 65"):
        plan_deployment(file, learners=65)


def test_learners_nodes_and_actors_are_taken_from_the_configuration(tmp_path: Path) -> None:
    text = (
        "env: CartPole-v1\nsampling: {groups: 12}\nlearners: 3\nray: {address: 'elsewhere:1', nodes: 3, actors_per_node: 2}\nengine: ray\n"
    )
    planned = plan_deployment(written(tmp_path, text))
    assert (planned.nodes, planned.actors_per_node, planned.learners) == (3, 2, None)
    assert yaml.safe_load(planned.settings) == {"env": {"id": "CartPole-v1"}, "sampling": {"groups": 12}, "learners": 3}
    assert plan_deployment(written(tmp_path, text), nodes=4, actors_per_node=3).nodes == 4


def test_a_gpu_that_is_asked_for_is_there_and_one_that_is_idle_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^device: cuda was asked for, and the head"):
        plan_deployment(written(tmp_path, "env: CartPole-v1\ndevice: cuda\n"))
    assert plan_deployment(written(tmp_path, "env: CartPole-v1\ndevice: cuda\n"), gpus=1).warnings == ()
    (warning,) = plan_deployment(written(tmp_path, "env: CartPole-v1\ndevice: cpu\n"), gpus=2).warnings
    assert warning == "gpus: the configuration says `device: cpu`, so the learners leave 2 GPUs idle"
    (warning,) = plan_deployment(written(tmp_path, "env: CartPole-v1\nlearners: 4\n"), gpus=2).warnings
    assert warning == "gpus: 4 learners want a GPU each, and the head has 2; give --gpus 4, or --learners 2"


def test_a_run_in_an_object_store_stays_there_and_its_needs_are_told(tmp_path: Path) -> None:
    planned = plan_deployment(written(tmp_path, "env: CartPole-v1\nrun_dir: s3://bucket/runs/one\n"))
    assert planned.run_url == "s3://bucket/runs/one"
    assert "run_dir" not in planned.settings
    (warning,) = planned.warnings
    assert warning.startswith(
        "run_dir: the run lies at s3://bucket/runs/one: the image needs the package that opens s3://, and the head its credentials"
    )


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://bucket/x?token=secret", "s3://bucket/$(secret)", "s3://bucket/a secret"])
def test_secrets_in_the_url_of_a_run_are_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: not the URL of a run|may hold a secret|names no directory") as said:
        plan_deployment(written(tmp_path, f"env: CartPole-v1\nrun_dir: '{url}'\n"))
    assert not any(shown in str(said.value) for shown in ("secret)", "secret@", "=secret", "key:"))


def test_the_run_whose_configuration_is_taken_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "copy"
    run.mkdir()
    (run / "run.db").touch()
    (run / "config.yaml").write_text("env: CartPole-v1\nrun_dir: s3://bucket/runs/one\n")
    assert plan_deployment(run).run_url is None


def test_a_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="there is no such configuration"):
            plan_deployment(path)


def test_a_file_of_this_machine_is_named_in_a_warning(tmp_path: Path) -> None:
    (tmp_path / "Own Env2.py").write_text("def make(): ...\n")
    planned = plan_deployment(written(tmp_path, f"env: '{tmp_path}/Own Env2.py:make'\n"))
    assert planned.name == "own-env2-make-ppo-0"
    (warning,) = planned.warnings
    assert warning.startswith(f"env.id is a file of this machine, {tmp_path}/Own Env2.py:make")


@given(st.text(max_size=60), st.integers(0, 2**63 - 1))
def test_every_configuration_has_a_name_that_kubernetes_takes(env: str, seed: int) -> None:
    config, _ = resolve("CartPole-v1", {"seed": seed})
    config.env.id = f"x{env}"
    name = checks._label(config)
    assert checks.re.fullmatch(checks._LABEL, name)
    assert len(name) <= checks.NAME_LENGTH


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.check_image, ["shoal:1", "registry.example.com:5000/a/b@sha256:0a"], ["", "a b", "a\nb", "$(x)", "a'b"]),
        (checks.check_namespace, ["default", "a-1"], ["", "A", "a_b", "-a", "a" * 64, "a\n"]),
        (checks.check_ray_version, ["2.52.0", "2.60.0", "3.0.1"], ["2.51.9", "1.13.0", "2.60", "latest", "2.60.0\n"]),
        (checks.check_partition, [None, "gpu", "a,b"], ["a b", "a\n#SBATCH", "$(x)"]),
        (checks.check_time, ["60", "24:00:00", "1-12", "1-12:30:00"], ["", "1h", "1:2:3:4", "1\n"]),
        (checks.check_runs, ["/runs", "/a/b-c_d"], ["runs", "$HOME/runs", "/a b", "/a\n", '/a"']),
    ],
)
def test_values_have_a_form_that_needs_no_quotes(check: Any, good: list[Any], bad: list[str]) -> None:
    assert [check(value) for value in good] == good
    for value in bad:
        with pytest.raises(ConfigError):
            check(value)


def test_variables_stand_only_where_a_shell_reads_them() -> None:
    assert checks.check_runs("$SLURM_SUBMIT_DIR/runs", variables=True) == "$SLURM_SUBMIT_DIR/runs"
    with pytest.raises(ConfigError):
        checks.check_runs("$(rm)/runs", variables=True)
    with pytest.raises(ConfigError):
        checks.check_runs("~/runs", variables=True)


def test_a_template_takes_values_drops_lines_and_keeps_indentation() -> None:
    template = "a: {{one}}-{{two}}\nb: {{none}}\nc: |\n  {{text}}\nd: {{{one}}}\n"
    filled = fill(template, {"one": 1, "two": "x{{one}}", "none": None, "text": "k: {{two}}\n\n  v\n"})
    assert filled == "a: 1-x{{one}}\nc: |\n  k: {{two}}\n\n    v\nd: {1}\n"
    with pytest.raises(KeyError):
        fill("{{other}}", {})


plain = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)


@given(st.dictionaries(st.text(min_size=1, max_size=6), plain | st.lists(plain, max_size=3), max_size=4))
def test_any_arguments_of_an_environment_come_back_from_the_embedded_text(kwargs: dict[str, Any]) -> None:
    text = dump_tree({"env": {"id": "X-v0", "kwargs": kwargs}})
    assert text.isascii()
    inside = yaml.safe_load(fill("config.yaml: |\n  {{settings}}\nnext: 1\n", {"settings": text}))
    assert inside == {"config.yaml": text, "next": 1}


def test_the_embedded_text_is_read_as_the_tree_that_it_was(tmp_path: Path) -> None:
    tree = {"env": {"id": "X-v0", "kwargs": {"a": "1e-3", "b": 1e-3, "c": "$HOME", "d": "é\u2028", "e": "two\nlines"}}, "seed": 7}
    assert read_yaml(written(tmp_path, dump_tree(tree))) == tree


def test_a_deployment_is_plain_data() -> None:
    assert Deployment("a", "", 1, 1, None, 1, 1, 0).warnings == ()
