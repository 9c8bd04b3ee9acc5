# Mail when a job fails, stalls or runs for too long, and when the project's spend nears its budget. A job whose workers
# never come up has produced nothing that could stall: Dataflow fails it after an hour. Missing data does not count as a
# stall, as every job that ends would raise it.

locals {
  alerts = var.alerts == null ? {} : {
    failed = {
      condition  = "a job has failed"
      metric     = "dataflow.googleapis.com/job/is_failed"
      aligner    = "ALIGN_MAX"
      comparison = "COMPARISON_GT"
      threshold  = 0
      duration   = "0s"
      advice     = "Read the job's log; a second launch with the same prompts and output makes only what is missing. No worker activity for an hour points at capacity, quota, zone or image."
    }
    stalled = {
      condition  = "no element produced for ${var.alerts.stall_minutes} minutes"
      metric     = "dataflow.googleapis.com/job/elements_produced_count"
      aligner    = "ALIGN_RATE"
      comparison = "COMPARISON_LT"
      threshold  = 0.000001
      duration   = "${var.alerts.stall_minutes * 60}s"
      advice     = "Workers that stopped point at one request, which their logs name. What the job wrote stays when it is cancelled."
    }
    long = {
      condition  = "a job has run for ${var.alerts.max_hours} hours"
      metric     = "dataflow.googleapis.com/job/elapsed_time"
      aligner    = "ALIGN_MAX"
      comparison = "COMPARISON_GT"
      threshold  = var.alerts.max_hours * 3600
      duration   = "0s"
      advice     = "Accelerators are billed by the hour: compare the run with its plan, or cancel it. What it wrote stays."
    }
  }
}

resource "google_monitoring_notification_channel" "email" {
  for_each = try(var.alerts.emails, toset([]))

  project      = var.project
  display_name = "${var.name} ${each.value}"
  type         = "email"
  labels       = { email_address = each.value }
  depends_on   = [google_project_service.this]
}

resource "google_monitoring_alert_policy" "this" {
  for_each = local.alerts

  project               = var.project
  display_name          = "${var.name}: ${each.value.condition}"
  combiner              = "OR"
  notification_channels = [for channel in google_monitoring_notification_channel.email : channel.id]
  user_labels           = local.labels

  conditions {
    display_name = each.value.condition

    condition_threshold {
      filter          = "resource.type = \"dataflow_job\" AND metric.type = \"${each.value.metric}\""
      comparison      = each.value.comparison
      threshold_value = each.value.threshold
      duration        = each.value.duration

      aggregations {
        alignment_period     = "300s"
        per_series_aligner   = each.value.aligner
        cross_series_reducer = "REDUCE_MAX"
        group_by_fields      = ["resource.label.job_name"]
      }
    }
  }

  documentation {
    content   = each.value.advice
    mime_type = "text/markdown"
  }

  alert_strategy {
    auto_close = "86400s"
  }
}

resource "google_billing_budget" "this" {
  count = var.budget == null ? 0 : 1

  billing_account = var.budget.billing_account
  display_name    = "${var.project} ${var.name}"

  budget_filter {
    projects = ["projects/${var.project}"]
  }

  amount {
    specified_amount {
      currency_code = var.budget.currency
      units         = tostring(var.budget.amount)
    }
  }

  dynamic "threshold_rules" {
    for_each = [0.5, 0.9, 1]
    content {
      threshold_percent = threshold_rules.value
    }
  }

  threshold_rules {
    threshold_percent = 1
    spend_basis       = "FORECASTED_SPEND"
  }

  all_updates_rule {
    monitoring_notification_channels = [for channel in google_monitoring_notification_channel.email : channel.id]
    disable_default_iam_recipients   = false
  }

  depends_on = [google_project_service.this]
}
