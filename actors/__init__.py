"""The roles of rlsys as they run: ordinary classes here, made into Ray actors by `actors.cluster` alone.

`ports` says what the controller asks of each role; `controller` is the loops; `run` puts a run together; `cli` is what
a person types.
"""
