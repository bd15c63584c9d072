{{/*
The services, by their key in the values. One table, so that names, ports, certificates and network policies cannot disagree.
  name      suffix of every object's name, and the name of the image and of the command
  port      gRPC port (the console's is HTTP)
  kind      Deployment, or StatefulSet where a pod keeps something of its own
  callers   who may open connections to the port, beside `networkPolicy.clients`
  uses      dependencies it opens connections to
  api       whether it calls the Kubernetes API
*/}}
{{- define "millrace.components" -}}
ingestion:
  {name: ingestion, port: 7401, kind: StatefulSet, callers: [feature, console, stage, jobs], uses: [postgres, kafka, objectStorage], api: false}
feature:
  {name: feature, port: 7402, kind: Deployment, callers: [inference-gateway, console, stage, jobs], uses: [postgres, redis, kafka, objectStorage], api: false}
registry:
  {name: registry, port: 7403, kind: Deployment, callers: [drift-monitor, rollout-controller, triton, console, stage, jobs], uses: [postgres, kafka, objectStorage], api: false}
trainingCoordinator:
  {name: training-coordinator, port: 7404, kind: StatefulSet, callers: [console, stage, jobs], uses: [postgres, kafka, objectStorage], api: true}
gateway:
  {name: inference-gateway, port: 7405, kind: StatefulSet, callers: [rollout-controller, console, jobs], uses: [kafka], api: true}
driftMonitor:
  {name: drift-monitor, port: 7406, kind: Deployment, callers: [rollout-controller, console, stage, jobs], uses: [postgres, kafka, objectStorage], api: false}
rolloutController:
  {name: rollout-controller, port: 7407, kind: Deployment, callers: [inference-gateway, console, jobs], uses: [], api: true}
console:
  {name: console, port: 7480, kind: Deployment, callers: [], uses: [], api: false}
{{- end -}}

{{/* Values of one component: `defaults` with the component's own over them. */}}
{{- define "millrace.componentValues" -}}
{{- mergeOverwrite (deepCopy .root.Values.defaults) (deepCopy (get .root.Values .key)) | toYaml -}}
{{- end -}}
