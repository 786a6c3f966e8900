"""Load and faults: requests of all kinds, good and bad, cut short at random; and the judge of what becomes of them.

`mix.py` says what is asked, `hearing.py` what an answer was, `verdicts.py` whether that was right, `client.py` sends;
`poison.py` spoils a drafter. `scripts/chaos.py` is the run.
"""
