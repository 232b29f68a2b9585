"""A module that leaves a process behind which holds every descriptor of the zygote, its channel included."""

import os
import time

if os.fork() == 0:
    time.sleep(600)
    os._exit(0)
