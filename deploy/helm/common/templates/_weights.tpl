{{- /* A model's files. An image has them at its root; a claim has them in a folder named by their digest, or at `path`, so several versions
may lie side by side. `weights` is {source: image | pvc | hf, ref, digest, claim, path, …}. */}}

{{- /* Takes root; name (of the volume); weights; claim (where the weights name none). */}}
{{- define "common.weightsVolume" -}}
- name: {{ .name }}
{{- if eq .weights.source "image" }}
  image:
    reference: {{ include "common.weightsReference" .weights | quote }}
    pullPolicy: {{ .weights.pullPolicy | default .root.Values.global.image.pullPolicy }}
{{- else }}
  persistentVolumeClaim: {claimName: {{ .weights.claim | default .claim }}, readOnly: true}
{{- end }}
{{- end }}

{{- /* The model's directory at mountPath. Takes name, mountPath, weights. */}}
{{- define "common.weightsMount" -}}
{{- $path := include "common.weightsPath" .weights -}}
- {name: {{ .name }}, mountPath: {{ .mountPath }}{{ with $path }}, subPath: {{ . | quote }}{{ end }}, readOnly: true}
{{- end }}

{{- define "common.weightsReference" -}}
{{- .ref -}}{{- with .digest }}@{{ . }}{{ end -}}
{{- end }}

{{- /* The folder in a claim; empty for its root, and for an image, where subPath is ignored. Takes weights. */}}
{{- define "common.weightsPath" -}}
{{- if ne .source "image" -}}
{{- .path | default (.digest | default "" | replace ":" "-") -}}
{{- end -}}
{{- end }}
