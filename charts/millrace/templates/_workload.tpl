{{/*
The Deployment or StatefulSet of a service. Arguments: `root`, `key`, and for pods with more than one container `sidecars` (YAML list of
containers as a string) and `graceSeconds` (added to the time the service itself needs to stop).
*/}}
{{- define "millrace.workload" -}}
{{- $root := .root -}}
{{- $component := get (include "millrace.components" $root | fromYaml) .key -}}
{{- $values := include "millrace.componentValues" . | fromYaml -}}
{{- $named := dict "root" $root "name" $component.name -}}
{{- $name := include "millrace.componentName" $named -}}
apiVersion: apps/v1
kind: {{ $component.kind }}
metadata:
  name: {{ $name }}
  labels:
    {{- include "millrace.componentLabels" $named | nindent 4 }}
  {{- with $values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if not $values.autoscaling.enabled }}
  replicas: {{ int $values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  {{- if eq $component.kind "StatefulSet" }}
  serviceName: {{ $name }}
  podManagementPolicy: Parallel
  minReadySeconds: {{ int $values.minReadySeconds }}
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: Retain
    whenScaled: Retain
  {{- else }}
  minReadySeconds: {{ int $values.minReadySeconds }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 1
  {{- end }}
  selector:
    matchLabels:
      {{- include "millrace.selectorLabels" $named | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "millrace.componentLabels" $named | nindent 8 }}
        {{- with $values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        kubectl.kubernetes.io/default-container: {{ $component.name }}
        checksum/config: {{ include "millrace.settings" . | sha256sum }}
        {{- with mergeOverwrite (deepCopy $root.Values.commonPodAnnotations) ($values.podAnnotations | default dict) }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "millrace.serviceAccountName" $named }}
      automountServiceAccountToken: {{ $component.api }}
      enableServiceLinks: false
      {{- include "millrace.podSecurity" $root | nindent 6 }}
      {{- include "millrace.pullSecrets" $root | nindent 6 }}
      {{- include "millrace.placement" (dict "values" $values "named" $named) | nindent 6 }}
      terminationGracePeriodSeconds: {{ add $values.shutdownDelaySeconds (mul 2 $values.drainSeconds) (.graceSeconds | default 0) 15 }}
      {{- if and $root.Values.bootstrap.wait $component.uses }}
      initContainers:
        {{- include "millrace.wait" (dict "root" $root "component" $component "values" $values) | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ $component.name }}
          image: {{ include "millrace.image" (dict "root" $root "image" $values.image) }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          command: [millrace-{{ $component.name }}, --config, /etc/millrace/config.yaml]
          {{- include "millrace.containerSecurity" $root | nindent 10 }}
          env:
            {{- include "millrace.environment" (dict "root" $root "values" $values "component" $component) | nindent 12 }}
          {{- include "millrace.environmentFrom" (dict "root" $root "component" $component) | nindent 10 }}
          ports:
            - {name: {{ ternary "http" "grpc" (eq .key "console") }}, containerPort: {{ $component.port }}}
            - {name: metrics, containerPort: 9090}
            {{- if eq .key "feature" }}
            - {name: reads, containerPort: 7408}
            {{- end }}
            {{- if and (eq .key "feature") $root.Values.feature.feast.http }}
            - {name: feast-http, containerPort: 6566}
            {{- end }}
          {{- include "millrace.probes" (dict "values" $values "port" "metrics" "live" "/livez" "ready" "/readyz") | nindent 10 }}
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          volumeMounts:
            {{- include "millrace.mounts" (dict "root" $root "component" $component) | nindent 12 }}
        {{- with .sidecars }}
        {{- . | nindent 8 }}
        {{- end }}
      volumes:
        {{- include "millrace.volumes" (dict "root" $root "component" $component "values" $values) | nindent 8 }}
  {{- if and (eq $component.kind "StatefulSet") $values.storage.enabled }}
  volumeClaimTemplates:
    {{- include "millrace.claim" (dict "name" "state" "storage" $values.storage "labels" (include "millrace.selectorLabels" $named)) | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* One claim of a StatefulSet: `name`, `storage` (size, storageClassName), `labels`. */}}
{{- define "millrace.claim" -}}
- apiVersion: v1
  kind: PersistentVolumeClaim
  metadata:
    name: {{ .name }}
    labels:
      {{- .labels | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .storage.storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
    resources:
      requests:
        storage: {{ .storage.size }}
{{- end -}}

{{- define "millrace.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "millrace.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "millrace.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Where pods may run: `values`, `named`. A spread constraint without a selector spreads the component's own pods. */}}
{{- define "millrace.placement" -}}
{{- $named := .named -}}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $selector := dict "labelSelector" (dict "matchLabels" (include "millrace.selectorLabels" $named | fromYaml)) }}
  - {{- mergeOverwrite $selector (deepCopy .) | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Probes of the plain HTTP port: the kubelet's own gRPC probe cannot do TLS. `values`, `port`, `live`, `ready`. */}}
{{- define "millrace.probes" -}}
{{- $probes := .values.probes -}}
startupProbe:
  httpGet: {path: {{ .live }}, port: {{ .port }}}
  periodSeconds: 1
  timeoutSeconds: {{ int $probes.timeoutSeconds }}
  failureThreshold: {{ int $probes.startSeconds }}
livenessProbe:
  httpGet: {path: {{ .live }}, port: {{ .port }}}
  periodSeconds: {{ int $probes.livenessPeriodSeconds }}
  timeoutSeconds: {{ int $probes.timeoutSeconds }}
  failureThreshold: 3
readinessProbe:
  httpGet: {path: {{ .ready }}, port: {{ .port }}}
  periodSeconds: {{ int $probes.readinessPeriodSeconds }}
  timeoutSeconds: {{ int $probes.timeoutSeconds }}
  failureThreshold: 2
{{- end -}}

{{- define "millrace.environment" -}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- if has "objectStorage" .component.uses }}
{{- range $key, $value := include "millrace.objectStorageVariables" .root | fromYaml }}
- {name: {{ $key }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- range $key, $value := .values.env }}
- {name: {{ $key }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end -}}

{{- define "millrace.environmentFrom" -}}
{{- $secret := include "millrace.objectStorageSecret" .root -}}
{{- if and $secret (has "objectStorage" .component.uses) }}
envFrom:
  - secretRef: {name: {{ $secret }}}
{{- end }}
{{- end -}}

{{- define "millrace.mounts" -}}
- {name: config, mountPath: /etc/millrace/config.yaml, subPath: config.yaml, readOnly: true}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/millrace/tls, readOnly: true}
{{- end }}
{{- if or (has "postgres" .component.uses) (has "redis" .component.uses) }}
- {name: secrets, mountPath: /etc/millrace/secrets, readOnly: true}
{{- end }}
{{- if and (has "kafka" .component.uses) (include "millrace.kafkaSecret" .root) }}
- {name: kafka, mountPath: /etc/millrace/kafka, readOnly: true}
{{- end }}
{{- if and (eq .component.name "inference-gateway") (ne .root.Values.gateway.tls.mode "none") }}
- {name: public-tls, mountPath: /etc/millrace/public-tls, readOnly: true}
{{- end }}
{{- if and (eq .component.name "inference-gateway") (include "millrace.authSecret" .root) }}
- {name: auth, mountPath: /etc/millrace/auth, readOnly: true}
{{- end }}
{{- if and (eq .component.name "ingestion") .root.Values.ingestion.sources.existingSecret }}
- {name: sources, mountPath: /etc/millrace/sources, readOnly: true}
{{- end }}
- {name: state, mountPath: /var/lib/millrace}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "millrace.volumes" -}}
{{- $named := dict "root" .root "name" .component.name -}}
- name: config
  configMap: {name: {{ include "millrace.componentName" $named }}}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "millrace.componentName" $named }}-tls, defaultMode: 288}
{{- end }}
{{- if eq .component.name "inference-gateway" }}
{{- with include "millrace.authSecret" .root }}
- name: auth
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- end }}
{{- if and (eq .component.name "inference-gateway") (ne .root.Values.gateway.tls.mode "none") }}
- name: public-tls
  secret: {secretName: {{ .root.Values.gateway.tls.existingSecret | default (printf "%s-tls" (include "millrace.componentName" $named)) }}, defaultMode: 288}
{{- end }}
{{- if or (has "postgres" .component.uses) (has "redis" .component.uses) }}
- name: secrets
  projected:
    defaultMode: 288
    sources:
      {{- if has "postgres" .component.uses }}
      - secret:
          name: {{ include "millrace.postgresSecret" .root }}
          items: [{key: {{ get .root.Values.postgres.keys .component.name | default .component.name }}, path: database-url}]
      {{- end }}
      {{- if has "redis" .component.uses }}
      - secret:
          name: {{ include "millrace.redisSecret" .root }}
          {{- if include "millrace.brings" (dict "root" .root "name" "redis") }}
          items: [{key: url, path: redis-url}]
          {{- else if .root.Values.redis.authority }}
          items: [{key: {{ .root.Values.redis.key }}, path: redis-url}, {key: ca.crt, path: redis-ca.crt}]
          {{- else }}
          items: [{key: {{ .root.Values.redis.key }}, path: redis-url}]
          {{- end }}
      {{- end }}
{{- end }}
{{- if has "kafka" .component.uses }}
{{- with include "millrace.kafkaSecret" .root }}
- name: kafka
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- end }}
{{- if eq .component.name "ingestion" }}
{{- with .root.Values.ingestion.sources.existingSecret }}
- name: sources
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- end }}
- name: tmp
  emptyDir: {sizeLimit: {{ .values.tmpSize }}}
{{- if not (and (eq .component.kind "StatefulSet") .values.storage.enabled) }}
- name: state
  emptyDir: {sizeLimit: {{ .values.storage.size }}}
{{- end }}
{{- end -}}

{{/* The Service of a component: `root`, `key`, `headless`. */}}
{{- define "millrace.service" -}}
{{- $component := get (include "millrace.components" .root | fromYaml) .key -}}
{{- $named := dict "root" .root "name" $component.name -}}
{{- $values := include "millrace.componentValues" . | fromYaml -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "millrace.componentName" $named }}
  labels:
    {{- include "millrace.componentLabels" $named | nindent 4 }}
  {{- with $values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if .headless }}
  clusterIP: None
  publishNotReadyAddresses: true
  {{- else }}
  type: {{ $values.service.type }}
  {{- end }}
  selector:
    {{- include "millrace.selectorLabels" $named | nindent 4 }}
    {{- with .selector }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - name: {{ ternary "http" "grpc" (eq .key "console") }}
      port: {{ $component.port }}
      targetPort: {{ ternary "http" "grpc" (eq .key "console") }}
    - name: metrics
      port: 9090
      targetPort: metrics
    {{- if eq .key "feature" }}
    - name: reads
      port: 7408
      targetPort: reads
    {{- end }}
    {{- if and (eq .key "feature") .root.Values.feature.feast.http }}
    - name: feast-http
      port: 6566
      targetPort: feast-http
    {{- end }}
    {{- if eq .key "gateway" }}
    - name: stats
      port: 9091
      targetPort: stats
    {{- end }}
{{- end -}}

{{/* Secret with what the gateway's callers prove themselves by; empty without. */}}
{{- define "millrace.authSecret" -}}
{{- $auth := .Values.gateway.auth -}}
{{- $discovered := and $auth.jwt.discovery.enabled (not $auth.jwt.discovery.authority) -}}
{{- if or $auth.apiKeys (and $auth.jwt.enabled (not $discovered)) -}}
{{- required "gateway.auth.existingSecret: is needed for keys and tokens" $auth.existingSecret -}}
{{- end -}}
{{- end -}}
