"""Experience on its way from actors to the learner: schema, ring of slots, envelope, ledger, batch."""
