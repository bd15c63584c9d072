{{/* Jobs of the chart run the image `bootstrap`: `millrace-bootstrap <command> --config /etc/millrace/config.yaml`. */}}

{{/*
Who gets a certificate, and for which DNS names: a map from the component's name to a list. Services have those of their Services; a name
without Services is a client only.
*/}}
{{- define "millrace.certificateNames" -}}
{{- $root := . -}}
{{- range $key, $component := include "millrace.components" . | fromYaml }}
{{ $component.name }}:
  {{- include "millrace.dnsNames" (dict "root" $root "name" $component.name) | nindent 2 }}
  {{- if eq $key "gateway" }}
  {{- include "millrace.dnsNames" (dict "root" $root "name" "gateway") | nindent 2 }}
  {{- $name := include "millrace.componentName" (dict "root" $root "name" $component.name) }}
  - "*.{{ $name }}.{{ $root.Release.Namespace }}.svc"
  - "*.{{ $name }}.{{ $root.Release.Namespace }}.svc.{{ $root.Values.clusterDomain }}"
  {{- end }}
  - localhost
{{- end }}
{{- range $name := list "client" "stage" "model-server" "bootstrap" }}
{{ $name }}:
  - {{ $name }}.{{ include "millrace.fullname" $root }}.{{ $root.Release.Namespace }}
{{- end }}
{{- end -}}

{{- define "millrace.dnsNames" -}}
{{- $name := include "millrace.componentName" . -}}
- {{ $name }}
- {{ $name }}.{{ .root.Release.Namespace }}
- {{ $name }}.{{ .root.Release.Namespace }}.svc
- {{ $name }}.{{ .root.Release.Namespace }}.svc.{{ .root.Values.clusterDomain }}
{{- end -}}

{{/* Settings of `millrace-bootstrap certificates`. */}}
{{- define "millrace.certificateSettings" -}}
certificates:
  namespace: {{ .Release.Namespace }}
  authority_secret: {{ include "millrace.fullname" . }}-ca
  authority_days: {{ int .Values.tls.builtin.authorityDays }}
  days: {{ int .Values.tls.builtin.days }}
  renew_before_days: {{ int .Values.tls.builtin.renewBeforeDays }}
  labels:
    {{- include "millrace.labels" . | nindent 4 }}
  secrets:
    {{- range $name, $names := include "millrace.certificateNames" . | fromYaml }}
    {{ include "millrace.componentName" (dict "root" $ "name" $name) }}-tls: {{ $names | toJson }}
    {{- end }}
{{- end -}}

{{/* Pod of one job: `root`, `name`, `command` (list), `config` (ConfigMap), `account`, `api`, `tls` and `kafka` (Secrets or empty). */}}
{{- define "millrace.jobPod" -}}
{{- $root := .root -}}
{{- $values := $root.Values.bootstrap -}}
metadata:
  labels:
    {{- include "millrace.componentLabels" (dict "root" $root "name" .name) | nindent 4 }}
    millrace.dev/network: jobs
spec:
  restartPolicy: Never
  serviceAccountName: {{ .account }}
  automountServiceAccountToken: {{ .api }}
  enableServiceLinks: false
  {{- include "millrace.podSecurity" $root | nindent 2 }}
  {{- include "millrace.pullSecrets" $root | nindent 2 }}
  {{- include "millrace.placement" (dict "values" $values "named" (dict "root" $root "name" .name)) | nindent 2 }}
  containers:
    - name: bootstrap
      image: {{ include "millrace.image" (dict "root" $root "image" $values.image) }}
      imagePullPolicy: {{ $root.Values.images.pullPolicy }}
      command: {{ .command | toJson }}
      {{- include "millrace.containerSecurity" $root | nindent 6 }}
      {{- with $values.env }}
      env:
        {{- range $key, $value := . }}
        - {name: {{ $key }}, value: {{ $value | toString | quote }}}
        {{- end }}
      {{- end }}
      resources:
        {{- toYaml $values.resources | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/millrace/config.yaml, subPath: config.yaml, readOnly: true}
        {{- if .tls }}
        - {name: tls, mountPath: /etc/millrace/tls, readOnly: true}
        {{- end }}
        {{- if .kafka }}
        - {name: kafka, mountPath: /etc/millrace/kafka, readOnly: true}
        {{- end }}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: config
      configMap: {name: {{ .config }}}
    {{- with .tls }}
    - name: tls
      secret: {secretName: {{ . }}, defaultMode: 288}
    {{- end }}
    {{- with .kafka }}
    - name: kafka
      secret: {secretName: {{ . }}, defaultMode: 288}
    {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
{{- end -}}

{{/* Init container that ends when the dependencies of a service answer: `root`, `component`, `values`. */}}
{{- define "millrace.wait" -}}
{{- $image := .root.Values.bootstrap -}}
- name: wait
  image: {{ include "millrace.image" (dict "root" .root "image" $image.image) }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [millrace-bootstrap, wait, --config, /etc/millrace/wait.yaml]
  {{- include "millrace.containerSecurity" .root | nindent 2 }}
  env:
    {{- include "millrace.environment" (dict "root" .root "values" .values "component" .component) | nindent 4 }}
  {{- include "millrace.environmentFrom" (dict "root" .root "component" .component) | nindent 2 }}
  resources:
    {{- toYaml $image.resources | nindent 4 }}
  volumeMounts:
    {{- include "millrace.mounts" (dict "root" .root "component" .component) | nindent 4 }}
    - {name: config, mountPath: /etc/millrace/wait.yaml, subPath: wait.yaml, readOnly: true}
{{- end -}}

{{/* Settings of `millrace-bootstrap wait` for one service: `root`, `component`. */}}
{{- define "millrace.waitSettings" -}}
bus:
  {{- include "millrace.bus" (dict "root" .root "secured" (has "kafka" .component.uses)) | nindent 2 }}
wait:
  kafka: {{ has "kafka" .component.uses }}
  {{- if has "postgres" .component.uses }}
  postgres: ["${file:/etc/millrace/secrets/database-url}"]
  {{- end }}
  {{- if has "redis" .component.uses }}
  redis: ["${file:/etc/millrace/secrets/redis-url}"]
  {{- if and .root.Values.redis.authority (not (include "millrace.brings" (dict "root" .root "name" "redis"))) }}
  redis_ca_file: /etc/millrace/secrets/redis-ca.crt
  {{- end }}
  {{- end }}
  {{- if has "objectStorage" .component.uses }}
  buckets: ["s3://{{ .root.Values.objectStorage.bucket }}"]
  {{- end }}
{{- end -}}
