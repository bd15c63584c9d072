"""Feast's own wire formats: an unmodified Feast 0.67 client reads from this service over HTTP and gRPC.

`requests` reads what clients send, `selection` compiles what they ask for once per definitions, `reads` answers, `json_answers` and
`message_answers` write the answer's bytes, `errors` says failures as Feast does; `http_edge` and `grpc_edge` are thin edges over them.
Nothing here imports Feast, whose import takes ten seconds; tests hold the formats against Feast's own code.
"""
