"""Set-up of the whole test run."""

import signal

# A shell without job control starts background commands with Ctrl-C ignored, and children inherit that: the tests that
# interrupt a process would wait for ever when the run itself stands in the background.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
