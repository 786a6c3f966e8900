"""The stress kit: requests of all kinds, good and bad, cut short at random, and the judge of the answers.

`requests.py` and `malformed.py` make requests, `client.py` sends them, `answers.py` reads the answers, `verdicts.py`
judges them against the texts of `reference.py`, `blame.py` finds whose fault a 5xx is, `servers.py` starts servers
under pressure and finds leaks, `poison.py` spoils a drafter. The scripts soak, fuzz and chaos are its profiles.
"""
