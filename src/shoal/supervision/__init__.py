"""Processes and what watches them: shared memory, channels, the zygote that forks roles, the board of activities.

Nothing here imports torch. The supervisor's side is `zygote.Zygote`, `channel.wait` and `heartbeat.ActivityBoard.records`;
a role's side is the `ChildContext` that its target is called with (zygote_main.py) and `heartbeat.Heartbeat`.
"""
