"""An environment of your own: by the path of its factory, or as any callable that returns a gymnasium.Env."""

from pathlib import Path

import gymnasium

import shoal

short = {"stop": {"updates": 5}, "sampling": {"groups": 2, "group_size": 4, "rollout_length": 64}, "actors": 2}

# By path: the run's config.yaml can be passed back to `shoal train`, and `shoal resume` needs nothing else.
corridor = Path(__file__).parent / "corridor.py"
run = shoal.train(f"{corridor}:make", env={"kwargs": {"length": 6}}, **short)
print("by path:", run.result["updates"], "updates, mean return", run.result["mean_return"])

# As an object: it travels to the processes by value. To resume or to evaluate later, give it again.
run = shoal.train(lambda: gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1").unwrapped, 100), **short)
print("as a lambda:", run.evaluate(episodes=3)["mean_length"], "steps an episode")
