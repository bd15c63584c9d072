{{/* What the training coordinator needs in a cluster: runs in PostgreSQL, stages as Jobs of this namespace, files through the work store. */}}
{{- define "millrace.settings.trainingCoordinator" -}}
{{- $stages := .Values.trainingStages -}}
database_url: ${file:/etc/millrace/secrets/database-url}
work_dir: /var/lib/millrace/work
ingestion_address: {{ include "millrace.address" (dict "root" . "key" "ingestion") }}
feature_address: {{ include "millrace.address" (dict "root" . "key" "feature") }}
registry_address: {{ include "millrace.address" (dict "root" . "key" "registry") }}
drift_address: {{ include "millrace.address" (dict "root" . "key" "driftMonitor") }}
training_address: {{ include "millrace.address" (dict "root" . "key" "trainingCoordinator") }}
kubernetes:
  namespace: {{ .Release.Namespace }}
  work_url: {{ $stages.workUrl | default (include "millrace.objectStorageUrl" (dict "root" . "use" "work")) }}
  work_claim: {{ $stages.workClaim | quote }}
  image: {{ include "millrace.image" (dict "root" . "image" $stages.image) }}
  image_pull_policy: {{ .Values.images.pullPolicy }}
  image_pull_secrets: {{ .Values.images.pullSecrets | toJson }}
  service_account: {{ include "millrace.fullname" . }}-stage
  tls_secret: {{ ternary (printf "%s-stage-tls" (include "millrace.fullname" .)) "" .Values.tls.enabled | quote }}
  env_from_secrets: {{ include "millrace.objectStorageSecret" . | list | compact | toJson }}
  env: {{ mergeOverwrite (include "millrace.objectStorageVariables" . | fromYaml) (deepCopy $stages.env) | toJson }}
  labels: {{ mergeOverwrite (dict "app.kubernetes.io/part-of" "millrace" "millrace.dev/network" "stage") (deepCopy $stages.podLabels) | toJson }}
  node_selector: {{ $stages.nodeSelector | toJson }}
  gpu_node_selector: {{ $stages.gpu.nodeSelector | toJson }}
  tolerations: {{ concat $stages.tolerations $stages.gpu.tolerations | toJson }}
  runtime_class: {{ $stages.runtimeClassName | quote }}
  priority_class: {{ $stages.priorityClassName | quote }}
  gpu_resource: {{ $stages.gpu.resource }}
  cpu_request_share: {{ $stages.cpuRequestShare }}
  max_concurrent_stages: {{ int $stages.maxConcurrent }}
  ttl_s: {{ int $stages.ttlSeconds }}
{{- end -}}
