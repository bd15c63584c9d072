{{/* Where the console asks. */}}
{{- define "millrace.settings.console" -}}
http_listen: 0.0.0.0:7480
ingestion_address: {{ include "millrace.address" (dict "root" . "key" "ingestion") }}
feature_address: {{ include "millrace.address" (dict "root" . "key" "feature") }}
registry_address: {{ include "millrace.address" (dict "root" . "key" "registry") }}
training_address: {{ include "millrace.address" (dict "root" . "key" "trainingCoordinator") }}
gateway_address: {{ include "millrace.address" (dict "root" . "key" "gateway") }}
drift_address: {{ include "millrace.address" (dict "root" . "key" "driftMonitor") }}
rollout_address: {{ include "millrace.address" (dict "root" . "key" "rolloutController") }}
{{- end -}}
