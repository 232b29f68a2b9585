"""Callbacks are called after every update, in this process, with the numbers of the run. One that returns False ends it, with a checkpoint."""

import shoal

history = []


def watch(numbers):
    history.append((numbers["update"], numbers["env_steps"], numbers["mean_return"], numbers["approx_kl"]))
    return numbers["update"] < 5  # False: enough


run = shoal.train("CartPole-v1", callbacks=[watch], actors=2)
for update, env_steps, mean_return, approx_kl in history:
    print(f"update {update}: {env_steps} steps, mean return {mean_return:.1f}, approx_kl {approx_kl:.4f}")
print("ended:", run.result["reason"])
run = shoal.resume(run.path, stop={"updates": 6})
print("resumed, and ended:", run.result["reason"])
