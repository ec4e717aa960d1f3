output "revision" {
  description = "Of the release."
  value       = helm_release.this.metadata.revision
}
