{{- /* A training pod on one pool, as a PodTemplateSpec. The worker only fills in name, labels, environment, the token volume and what
belongs to the job. Takes root, pool, gpus, image, resources, priorityClassName, graceSeconds (60: SIGTERM to SIGKILL, longer than a
checkpoint takes), shmGiB (8), bases (name → {weights}), annotations. */}}
{{- define "common.trainerPodTemplate" -}}
{{- $root := .root -}}
{{- $provider := .root.Values.global.provider -}}
metadata:
  labels:
    app.kubernetes.io/name: argosy
    app.kubernetes.io/instance: {{ .root.Release.Name }}
    app.kubernetes.io/component: trainer
    app.kubernetes.io/part-of: argosy
    argosy.dev/pool: {{ .pool }}
  {{- if or .annotations (eq $provider "karpenter") }}
  annotations:
    {{- if eq $provider "karpenter" }}
    karpenter.sh/do-not-disrupt: "true"
    {{- end }}
    {{- with .annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  restartPolicy: Never
  {{- include "common.podSpec" (dict "root" .root) | nindent 2 }}
  serviceAccountName: argosy-trainer
  terminationGracePeriodSeconds: {{ .graceSeconds | default 60 | int }}
  {{- with .priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with include "common.scheduling" (dict "root" .root "pools" (list .pool) "claim" (include "common.trainerClaim" .)) }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
  - name: trainer
    image: {{ include "common.image" (dict "root" .root "name" "trainer" "image" .image) }}
    imagePullPolicy: {{ .root.Values.global.image.pullPolicy }}
    securityContext: {{- include "common.containerSecurity" . | nindent 6 }}
    resources: {{- include "common.resources" (dict "root" .root "pools" (list .pool) "gpus" .gpus "resources" .resources) | nindent 6 }}
    env:
    {{- include "common.cacheEnv" . | nindent 4 }}
    {{- with .root.Values.global.store.credentialsSecret }}
    envFrom:
    - secretRef: {name: {{ . }}}
    {{- end }}
    terminationMessagePolicy: File
    volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    {{- range $name, $base := .bases }}
    {{- include "common.weightsMount" (dict "name" (include "common.baseVolumeName" $name) "mountPath" (printf "/base/%s" $name) "weights" $base.weights) | nindent 4 }}
    {{- end }}
    {{- with include "common.storeMount" (dict "root" .root) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  volumes:
  - name: tmp
    emptyDir: {}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .shmGiB | default 8 | int }}Gi}
  {{- range $name, $base := .bases }}
  {{- include "common.weightsVolume" (dict "root" $root "name" (include "common.baseVolumeName" $name) "weights" $base.weights) | nindent 2 }}
  {{- end }}
  {{- with include "common.storeVolume" (dict "root" .root) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* base-<name> as a volume may be called. */}}
{{- define "common.baseVolumeName" -}}
{{- $name := regexReplaceAll "[^a-z0-9-]" (printf "base-%s" .) "-" -}}
{{- ternary $name (printf "%s-%s" (trunc 54 $name | trimSuffix "-") (sha256sum . | trunc 8)) (and (eq $name (printf "base-%s" .)) (le (len $name) 63)) -}}
{{- end }}

{{- /* The ResourceClaimTemplate that training pods of a DRA pool name, in their own namespace. Takes root, pool, gpus. */}}
{{- define "common.trainerClaim" -}}
{{ include "common.claimName" (dict "prefix" (printf "argosy-trainer-%s" .pool) "root" .root "pools" (list .pool) "gpus" .gpus) }}
{{- end }}
