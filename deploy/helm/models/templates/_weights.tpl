{{- /* What the fetching program is told. Takes root, weights. */}}
{{- define "models.fetchEnv" -}}
{{- $weights := .weights -}}
{{- include "common.cacheEnv" . }}
- {name: ARGOSY_WEIGHTS_SOURCE, value: {{ ternary (printf "hf://%s" $weights.ref) $weights.ref (eq $weights.source "hf") | quote }}}
{{- with $weights.revision }}
- {name: ARGOSY_WEIGHTS_REVISION, value: {{ . | quote }}}
{{- end }}
- {name: ARGOSY_WEIGHTS_DIRECTORY, value: {{ printf "/weights/%s" (include "common.weightsPath" $weights) | quote }}}
- {name: ARGOSY_WEIGHTS_DIGEST, value: {{ $weights.digest | quote }}}
{{- with $weights.tokenSecret.name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $weights.tokenSecret.key }}}}
{{- end }}
{{- end }}

{{- /* The pod that fetches a model's weights into its claim. Takes it, entry. */}}
{{- define "models.fetchPod" -}}
{{- $root := .it.root -}}{{- $weights := .entry.weights -}}
metadata:
  labels: {{- include "common.labels" (dict "root" $root "component" "weights" "model" .it.model) | nindent 4 }}
spec:
  restartPolicy: Never
  {{- include "common.podSpec" .it | nindent 2 }}
  serviceAccountName: default
  affinity:
    podAffinity:     # a claim for one node is where its model is
      preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector: {matchLabels: {{ include "common.selector" .it }}}
  containers:
  - name: weights
    image: {{ include "models.image" (dict "root" $root "entry" .entry) }}
    imagePullPolicy: {{ $root.Values.global.image.pullPolicy }}
    command: [python, -m, services.pretrained.prefetch]
    securityContext: {{- include "common.containerSecurity" . | nindent 6 }}
    resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {memory: 4Gi}}
    env: {{- include "models.fetchEnv" (dict "root" $root "weights" $weights) | nindent 4 }}
    {{- with $root.Values.global.store.credentialsSecret }}
    envFrom:
    - secretRef: {name: {{ . }}}
    {{- end }}
    volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: weights, mountPath: /weights}
  volumes:
  - name: tmp
    emptyDir: {}
  - name: weights
    persistentVolumeClaim: {claimName: {{ include "models.claim" (dict "it" .it "weights" $weights) }}}
{{- end }}
