"""The two lines, in a script without `if __name__ == "__main__"`, after torch was imported (and its threads may spin)."""

import gymnasium
import torch

import shoal

torch.manual_seed(0)
print("torch has", torch.get_num_threads(), "threads here")

run = shoal.train("CartPole-v1", algorithm="ppo", stop={"return": 475, "updates": 6}, seed=1)
policy = run.policy()

env = gymnasium.make("CartPole-v1")
observation, info = env.reset(seed=0)
state = None
steps, ended = 0, False
while not ended:
    action, state = policy.predict(observation, state, deterministic=True)
    observation, reward, terminated, truncated, info = env.step(action)
    steps, ended = steps + 1, terminated or truncated
print("one episode of", steps, "steps with policy version", run.result["policy_version"])
print("ten episodes:", shoal.evaluate(run, episodes=10)["mean_return"])
