{{- /* What only this chart needs; names, labels, probes, security, drain and TLS are the library's. Each takes the root context. */}}

{{- define "platform.modelNamespaces" -}}
{{- .Values.gateway.modelNamespaces | default (list .Release.Namespace) | uniq | toJson }}
{{- end }}

{{- define "platform.jobNamespaces" -}}
{{- concat .Values.finetune.jobNamespaces (values .Values.finetune.tenantNamespaces) | uniq | sortAlpha | toJson }}
{{- end }}

{{- /* As the worker reads it: everybody's, then project=namespace. */}}
{{- define "platform.jobNamespacesSetting" -}}
{{- $all := .Values.finetune.jobNamespaces }}
{{- range $project, $namespace := .Values.finetune.tenantNamespaces }}{{ $all = append $all (printf "%s=%s" $project $namespace) }}{{ end }}
{{- join "," $all }}
{{- end }}

{{- /* Who reads metrics. */}}
{{- define "platform.scraped" -}}
- from:
  - namespaceSelector: {{- toYaml .Values.networkPolicy.prometheus.namespaceSelector | nindent 6 }}
  ports: [{protocol: TCP, port: 9090}]
{{- end }}

{{- define "platform.components" -}}
{{- ternary (list "gateway" "finetune") (list "gateway") .Values.finetune.enabled | toJson }}
{{- end }}

{{- define "platform.commonEnv" -}}
{{ include "common.cacheEnv" . }}
- {name: ARGOSY_HEALTH_ADDRESS, value: "0.0.0.0:8081"}
- {name: ARGOSY_METRICS_ADDRESS, value: "0.0.0.0:9090"}
- {name: ARGOSY_ANNOUNCE_SECONDS, value: "5"}
- name: ARGOSY_DATABASE_URL
  valueFrom: {secretKeyRef: {{ include "platform.databaseSecret" . }}}
- name: ARGOSY_PAGE_TOKEN_KEY
  valueFrom: {secretKeyRef: {name: {{ include "common.keysSecret" (dict "root" .) }}, key: page-token-key}}
{{- with .Values.monitoring.otlpEndpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- /* What the chart says itself, each from a value of its own; a second entry of a name would be refused by the API server. */}}
{{- define "platform.ownSettings" -}}
ADDRESS ANNOUNCE_SECONDS BASES CACHE_DIR CALLER_PUBLIC_KEYS CALLER_SIGNING_KEY CERTIFICATE CLIENT_CA DATABASE_URL ENDED_JOB_SECONDS
FINETUNE_ADDRESS GPU_HEALTH GRACE_SECONDS HEALTH_ADDRESS JOB_NAMESPACES JOURNAL_DIR KEY_PEPPER LAUNCHER MANIFEST_KEY MAX_STREAM_SECONDS
METRICS_ADDRESS MODEL_NAMESPACES PAGE_TOKEN_KEY POD_TEMPLATES PRIVATE_KEY QUEUE_NAME QUEUE_PRIORITY_CLASS SCALER_ADDRESS STORE_URL TLS_CA
TLS_CERTIFICATE TLS_PRIVATE_KEY TRAINING_ADDRESS TRAINING_LISTEN_ADDRESS TRAINING_NODES TRAINING_POOL TRAINING_SLOTS
{{- end }}

{{- /* Takes a map: more variables by name. */}}
{{- define "platform.settings" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ toString $value | quote }}}
{{- end }}
{{- end }}

{{- define "platform.databaseSecret" -}}
{{- $given := .Values.global.database.urlSecret }}
{{- ternary (dict "name" $given.name "key" $given.key) (dict "name" (printf "%s-database" .Release.Name) "key" "url") (ne $given.name "") | toJson }}
{{- end }}

{{- define "platform.commonMounts" -}}
{{ include "common.tlsMount" . }}
- {name: keys, mountPath: /etc/argosy/keys, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- /* Takes root, component, key: the one private key that the component signs with. Public halves are for everybody. */}}
{{- define "platform.commonVolumes" -}}
{{ include "common.tlsVolume" . }}
- name: keys
  secret:
    secretName: {{ include "common.keysSecret" (dict "root" .root) }}
    items:
    {{- range list .key "signing-key.pub.pem" "manifest-key.pub.pem" }}
    - {key: {{ . }}, path: {{ . }}}
    {{- end }}
- name: tmp
  emptyDir: {}
{{- end }}

{{- /* The API server's token, for the two that talk to it; everybody else has none. */}}
{{- define "platform.tokenMount" -}}
- {name: cluster, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}

{{- define "platform.tokenVolume" -}}
- name: cluster
  projected:
    sources:
    - serviceAccountToken: {path: token, expirationSeconds: 3600}
    - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
    - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
{{- end }}

{{- /* Takes root, component, values (with nodeSelector and tolerations): one replica a node and zone, as far as there are any. */}}
{{- define "platform.placement" -}}
topologySpreadConstraints:
{{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector: {matchLabels: {{ include "common.selector" (pick $ "root" "component") }}}
  matchLabelKeys: [pod-template-hash]
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 0 }}
{{- end }}
{{- if .root.Values.priorityClasses.create }}
priorityClassName: {{ .root.Release.Name }}-gateway
{{- end }}
{{- end }}

{{- define "platform.bases" -}}
{{- $bases := list }}
{{- range $name, $_ := .Values.finetune.bases }}{{ $bases = append $bases (printf "%s=/base/%s" $name $name) }}{{ end }}
{{- join "," $bases }}
{{- end }}

{{- define "platform.trainingPool" -}}
{{ .Values.finetune.pool | default (include "common.poolNames" (dict "root" .) | fromJsonArray | first) }}
{{- end }}

{{- define "platform.baseMounts" -}}
{{- range $name, $base := .Values.finetune.bases }}
{{- include "common.weightsMount" (dict "name" (include "common.baseVolumeName" $name) "mountPath" (printf "/base/%s" $name) "weights" $base.weights) | nindent 0 }}
{{- end }}
{{- end }}

{{- define "platform.baseVolumes" -}}
{{- range $name, $base := .Values.finetune.bases }}
{{- include "common.weightsVolume" (dict "root" $ "name" (include "common.baseVolumeName" $name) "weights" $base.weights) | nindent 0 }}
{{- end }}
{{- end }}

{{- /* <pool>.yaml → a PodTemplateSpec. A pool without GPUs gets no GPU, whatever an attempt has elsewhere. */}}
{{- define "platform.pools" -}}
{{- $finetune := .Values.finetune }}
{{- range $pool := include "common.poolNames" (dict "root" .) | fromJsonArray }}
{{- $mode := (include "common.pool" (dict "root" $ "pool" $pool) | fromJson).gpu.mode }}
{{ $pool }}.yaml: |
  {{- include "common.trainerPodTemplate" (dict "root" $ "pool" $pool "gpus" (ternary 0 (max 1 (int $finetune.gpus)) (eq $mode "none")) "image" $finetune.trainerImage "resources" $finetune.trainer.resources "priorityClassName" (ternary (printf "%s-training" $.Release.Name) "" $.Values.priorityClasses.create) "bases" $finetune.bases) | nindent 2 }}
{{- end }}
{{- end }}
