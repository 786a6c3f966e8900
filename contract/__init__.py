"""The contract with SGLang: every name of it that the server uses, and what another release would change.

python -m contract FOLDER      check the SGLang that lies in FOLDER (`make compat VERSION=x` downloads one)
python -m contract --record    write terms.json anew, after our code has come to use other names

source.py      a package's source code, read without importing it
words.py       what our names for SGLang's objects stand for: the only part that is kept by hand
uses.py        what our code uses, read from its syntax trees
terms.py       the contract: uses with signatures and fingerprints of the release that we are made for
changes.py     the contract against another release
terms.json     the recorded contract; a test compares it with our code and with the installed SGLang
"""
