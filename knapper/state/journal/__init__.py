"""How a run lives in an object store: accept, claim, fence, apply, commit, snapshot, replay, collect."""
