{{- /* A model's pod, as a PodTemplateSpec's content. Takes it (root, component, model), entry, and follower: a LeaderWorkerSet's pod that
answers nobody. */}}
{{- define "models.pod" -}}
{{- $it := .it -}}{{- $entry := .entry -}}{{- $root := .it.root -}}{{- $follower := .follower -}}
{{- $claim := include "common.claimName" (dict "prefix" (include "common.name" $it) "root" $root "pools" $entry.pools "gpus" $entry.gpus) -}}
metadata:
  labels:
    {{- include "common.labels" $it | nindent 4 }}
    argosy.dev/pool: {{ first $entry.pools }}
    {{- with $entry.weights.digest }}
    argosy.dev/model-revision: {{ trimPrefix "sha256:" . | trunc 12 | quote }}
    {{- end }}
  {{- $karpenter := eq $root.Values.global.provider "karpenter" }}
  {{- if or $karpenter $entry.podAnnotations }}
  annotations:
    {{- if $karpenter }}
    karpenter.sh/do-not-disrupt: {{ int $entry.load.maxSeconds }}s
    {{- end }}
    {{- with $entry.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  {{- include "common.podSpec" $it | nindent 2 }}
  serviceAccountName: {{ include "models.serviceAccount" $root }}
  terminationGracePeriodSeconds: {{ int $entry.grace }}
  {{- with $entry.priority }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with include "common.scheduling" (dict "root" $root "pools" $entry.pools "claim" $claim "spread" (ternary (include "common.selectorLabels" $it | fromYaml) dict (eq (int $entry.nodesPerReplica) 1)) "revision" "pod-template-hash") }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if $entry.fetched }}
  initContainers:
  - name: weights
    image: {{ include "models.image" (dict "root" $root "entry" $entry) }}
    imagePullPolicy: {{ $root.Values.global.image.pullPolicy }}
    command: {{ ternary (include "models.fetchCommand" $entry.weights) (append (include "models.fetchCommand" $entry.weights | fromJsonArray) "--wait" | toJson) (ne $entry.cacheClass "") }}
    securityContext: {{- include "common.containerSecurity" . | nindent 6 }}
    resources: {requests: {cpu: 100m, memory: 512Mi}, limits: {memory: 2Gi}}
    env: {{- include "models.fetchEnv" $entry.weights | nindent 4 }}
    volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: weights, mountPath: /weights}
  {{- end }}
  containers:
  - name: model
    image: {{ include "models.image" (dict "root" $root "entry" $entry) }}
    imagePullPolicy: {{ $root.Values.global.image.pullPolicy }}
    securityContext: {{- include "common.containerSecurity" . | nindent 6 }}
    {{- if $follower }}
    command: {{ include "models.vllmFollower" $entry }}
    {{- else }}
    ports:
    - {name: grpc, containerPort: 8500}
    - {name: health, containerPort: 8081}
    - {name: metrics, containerPort: 9090}
    {{- include "common.probes" (dict "startSeconds" $entry.load.maxSeconds) | nindent 4 }}
    {{- end }}
    lifecycle: {preStop: {sleep: {seconds: {{ int $entry.drain.sleepSeconds }}}}}
    resources: {{- include "common.resources" (dict "root" $root "pools" $entry.pools "gpus" $entry.gpus "resources" $entry.resources) | nindent 6 }}
    env:
    {{- include "models.env" . | nindent 4 }}
    {{- with $root.Values.global.store.credentialsSecret }}
    envFrom:
    - secretRef: {name: {{ . }}}
    {{- end }}
    volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    - {name: keys, mountPath: /etc/argosy/keys, readOnly: true}
    {{- include "common.tlsMount" $it | nindent 4 }}
    {{- include "common.weightsMount" (dict "name" "weights" "mountPath" "/weights" "weights" $entry.weights) | nindent 4 }}
    {{- with include "common.storeMount" (dict "root" $root "readOnly" true) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  volumes:
  - name: tmp
    emptyDir: {}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ int $entry.shmGiB }}Gi}
  - name: keys
    secret:
      secretName: {{ include "common.keysSecret" $it }}
      items:
      - {key: signing-key.pub.pem, path: signing-key.pub.pem}
      - {key: manifest-key.pub.pem, path: manifest-key.pub.pem}
  {{- include "common.tlsVolume" $it | nindent 2 }}
  {{- if $entry.cacheClass }}
  - name: weights
    ephemeral:
      volumeClaimTemplate:
        spec:
          accessModes: [ReadWriteOnce]
          storageClassName: {{ $entry.cacheClass }}
          resources: {requests: {storage: {{ $entry.weights.size }}}}
  {{- else }}
  {{- include "common.weightsVolume" (dict "root" $root "name" "weights" "weights" $entry.weights "claim" (include "models.claim" (dict "it" $it "weights" $entry.weights))) | nindent 2 }}
  {{- end }}
  {{- with include "common.storeVolume" (dict "root" $root) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "models.image" -}}
{{ include "common.image" (dict "root" .root "name" "inference" "image" .entry.engine.image) }}
{{- end }}

{{- /* vLLM's arguments: the model is split over a node's GPUs, then over the nodes of its group. Takes entry. */}}
{{- define "models.vllmArgs" -}}
{{- $args := dict -}}
{{- if gt (int .gpus) 1 }}{{ $_ := set $args "tensor_parallel_size" (int .gpus) }}{{ end -}}
{{- if gt (int .nodesPerReplica) 1 -}}
{{- $args = merge $args (dict "pipeline_parallel_size" (int .nodesPerReplica) "nnodes" (int .nodesPerReplica) "node_rank" "$(LWS_WORKER_INDEX)" "master_addr" "$(LWS_LEADER_ADDRESS)") -}}
{{- end -}}
{{- $pairs := list -}}
{{- range $name, $value := include "common.overlay" (dict "base" $args "top" .engine.args) | fromJson -}}
{{- $pairs = append $pairs (printf "%s=%s" $name (toString $value)) -}}
{{- end -}}
{{- join "," $pairs -}}
{{- end }}

{{- /* A group's other nodes run vLLM alone, without its API; the leader tells them what to do. Takes entry. A JSON list. */}}
{{- define "models.vllmFollower" -}}
{{- $words := list (.engine.python | default "python") "-m" "vllm.entrypoints.cli.main" "serve" "/weights" "--headless" -}}
{{- range splitList "," (include "models.vllmArgs" .) -}}
{{- $pair := splitn "=" 2 . -}}
{{- $words = append $words (printf "--%s=%s" ($pair._0 | replace "_" "-") $pair._1) -}}
{{- end -}}
{{- toJson $words -}}
{{- end }}

{{- define "models.env" -}}
{{- $entry := .entry -}}{{- $root := .it.root -}}
{{- include "common.cacheEnv" . }}
- {name: ARGOSY_ADDRESS, value: "0.0.0.0:8500"}
- {name: ARGOSY_HEALTH_ADDRESS, value: "0.0.0.0:8081"}
- {name: ARGOSY_METRICS_ADDRESS, value: "0.0.0.0:9090"}
- {name: ARGOSY_CERTIFICATE, value: /etc/argosy/tls/tls.crt}
- {name: ARGOSY_PRIVATE_KEY, value: /etc/argosy/tls/tls.key}
{{- if $root.Values.global.tls.requireClientCert }}
- {name: ARGOSY_CLIENT_CA, value: /etc/argosy/tls/ca.crt}
{{- end }}
- {name: ARGOSY_ANNOUNCE_SECONDS, value: "5"}
- {name: ARGOSY_GRACE_SECONDS, value: {{ int $entry.drain.maxGenerationSeconds | quote }}}
- {name: ARGOSY_MAX_STREAM_SECONDS, value: {{ int $entry.drain.maxGenerationSeconds | quote }}}
- {name: ARGOSY_MODEL, value: /weights}
- {name: ARGOSY_MODEL_NAME, value: {{ .it.model | quote }}}
- {name: ARGOSY_CACHE_DIR, value: /tmp/cache/argosy}
- {name: ARGOSY_DEVICE, value: {{ ternary "cpu" "cuda" $entry.cpuOnly }}}
{{- if $entry.cpuOnly }}
- name: ARGOSY_THREADS
  valueFrom: {resourceFieldRef: {containerName: model, resource: {{ ternary "limits.cpu" "requests.cpu" (hasKey ($entry.resources.limits | default dict) "cpu") }}, divisor: "1"}}
{{- end }}
- {name: ARGOSY_CALLER_PUBLIC_KEYS, value: gateway=/etc/argosy/keys/signing-key.pub.pem}
{{- if and $root.Values.global.store.url (ne $entry.engine.kind "vllm") }}
- {name: ARGOSY_STORE_URL, value: {{ $root.Values.global.store.url | quote }}}
- {name: ARGOSY_MANIFEST_PUBLIC_KEYS, value: finetune=/etc/argosy/keys/manifest-key.pub.pem}
{{- end }}
{{- with $root.Values.monitoring.otlpEndpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- if eq $entry.engine.kind "vllm" }}
- {name: ARGOSY_ENGINE_KIND, value: vllm}
{{- with $entry.engine.python }}
- {name: ARGOSY_ENGINE_PYTHON, value: {{ . | quote }}}
{{- end }}
- {name: ARGOSY_ENGINE_ARGS, value: {{ include "models.vllmArgs" $entry | quote }}}
{{- else }}
{{- range $name, $value := $entry.engine.args }}
- {name: ARGOSY_{{ upper $name }}, value: {{ toString $value | quote }}}
{{- end }}
{{- end }}
{{- end }}
