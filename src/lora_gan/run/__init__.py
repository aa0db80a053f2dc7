"""One call of fit(), from outside: callbacks, logs, display, evaluation, saving, recovery, resume."""
