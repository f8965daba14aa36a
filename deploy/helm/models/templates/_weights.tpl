{{- /* The words of the fetching program. Takes weights. A JSON list. */}}
{{- define "models.fetchCommand" -}}
{{- $words := list "python" "-m" "services.pretrained.prefetch" (ternary (printf "hf://%s" .ref) .ref (eq .source "hf")) (printf "/weights/%s" (include "common.weightsPath" .)) "--digest" .digest -}}
{{- with .revision }}{{ $words = concat $words (list "--revision" .) }}{{ end -}}
{{- toJson $words -}}
{{- end }}

{{- /* Takes weights. */}}
{{- define "models.fetchEnv" -}}
{{- include "common.cacheEnv" . }}
{{- with .tokenSecret.name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.tokenSecret.key }}}}
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
  serviceAccountName: {{ include "models.serviceAccount" $root }}
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
    command: {{ include "models.fetchCommand" $weights }}
    securityContext: {{- include "common.containerSecurity" . | nindent 6 }}
    resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {memory: 4Gi}}
    env: {{- include "models.fetchEnv" $weights | nindent 4 }}
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
